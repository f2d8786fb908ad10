// The chat view: a conversation, one answer at a time.

import { streamChat } from "./api.js";
import { appendTokens, drawMeter } from "./view.js";

export class Chat {
  #messages = [];
  #answering = null;

  constructor(settings) {
    this.settings = settings;
    this.log = document.getElementById("log");
    this.form = document.getElementById("chat-form");
    this.meter = document.getElementById("chat-meter");
    this.prompt = this.form.elements.prompt;
    this.send = this.form.querySelector("[type=submit]");
    this.stopButton = this.form.querySelector(".stop");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.stopButton.addEventListener("click", () => this.stop());
    this.form.querySelector(".clear").addEventListener("click", () => this.#clear());
  }

  stop() {
    this.#answering?.abort();
  }

  #clear() {
    this.stop();
    this.#messages = [];
    this.log.replaceChildren();
    this.meter.replaceChildren();
    this.prompt.focus();
  }

  async #ask() {
    const question = this.prompt.value.trim();
    if (!question || this.#answering) return;
    this.prompt.value = "";
    this.#bubble("user", question);
    const bubble = this.#bubble("assistant", "");
    const messages = [...this.#messages, { role: "user", content: question }];
    const answering = new AbortController();
    this.#busy(answering);
    let text = "";
    try {
      const { key, ...fields } = this.settings();
      for await (const choice of streamChat({ ...fields, messages }, key, answering.signal)) {
        appendTokens(bubble, choice.details.runs);
        drawMeter(this.meter, choice.details);
        text += choice.delta.content ?? "";
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#bubble("error", error.message);
    } finally {
      this.#busy(null);
    }
    // A turn that brought nothing is not part of the conversation; cleared ones are gone.
    if (text && bubble.isConnected) {
      this.#messages = [...messages, { role: "assistant", content: text }];
    }
  }

  #busy(answering) {
    this.#answering = answering;
    this.send.disabled = answering !== null;
    this.stopButton.hidden = answering === null;
  }

  #bubble(kind, text) {
    this.log.querySelector(".hint")?.remove();
    const bubble = document.createElement("p");
    bubble.className = `message ${kind}`;
    bubble.textContent = text;
    this.log.append(bubble);
    this.log.scrollTop = this.log.scrollHeight;
    return bubble;
  }
}
