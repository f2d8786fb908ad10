// The race view: the plain model and I-DLM on one prompt, at the same time.

import { streamChat } from "./api.js";
import { appendTokens, drawMeter } from "./view.js";

class Runner {
  constructor(name) {
    this.text = document.getElementById(`${name}-text`);
    this.meter = document.getElementById(`${name}-meter`);
  }

  async run(body, key, signal) {
    this.tokens = [];
    this.text.replaceChildren();
    this.meter.replaceChildren();
    for await (const { details } of streamChat(body, key, signal)) {
      this.tokens.push(...details.runs.map((run) => run.token_id));
      appendTokens(this.text, details.runs);
      drawMeter(this.meter, details);
    }
  }
}

export class Race {
  #running = null;

  constructor(settings, model) {
    this.settings = settings;
    this.model = model;
    this.form = document.getElementById("race-form");
    this.verdict = document.getElementById("verdict");
    this.start = this.form.querySelector("[type=submit]");
    this.stopButton = this.form.querySelector(".stop");
    this.runners = ["ar", "idlm"].map((name) => new Runner(name));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    this.form.elements.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.stopButton.addEventListener("click", () => this.stop());
  }

  stop() {
    this.#running?.abort();
  }

  async #run() {
    if (this.#running) return;
    const { key, stride: chosen, ...fields } = this.settings();
    const stride = chosen ?? this.model()?.stride ?? 4;
    if (stride < 2) {
      this.#say("This server decodes one token per forward; a race needs an adapter and a stride above 1.", "differs");
      return;
    }
    const most = stride === "auto" ? "as many tokens per forward as pay" : `up to ${stride} tokens per forward`;
    document.getElementById("idlm-how").textContent = most;
    const prompt = this.form.elements.prompt.value;
    // The coupled rule makes the texts the same at any temperature.
    const body = { ...fields, verification: "coupled", messages: [{ role: "user", content: prompt }] };
    const racing = new AbortController();
    this.#busy(racing);
    this.#say("Running …", "");
    let atFirstFinish = null;
    const runs = this.runners.map((runner, lane) =>
      runner.run({ ...body, stride: lane === 0 ? 1 : chosen }, key, racing.signal).then(() => {
        atFirstFinish ??= this.runners.map((other) => other.tokens.length);
      }),
    );
    try {
      await Promise.all(runs);
      this.#compare(atFirstFinish);
    } catch (error) {
      racing.abort();
      this.#say(error.name === "AbortError" ? "Stopped." : error.message, "differs");
    } finally {
      this.#busy(null);
    }
  }

  #compare([arTokens, idlmTokens]) {
    const [ar, idlm] = this.runners.map((runner) => runner.tokens);
    const length = Math.max(ar.length, idlm.length);
    const differs = Array.from({ length }, (_, i) => i).find((i) => ar[i] !== idlm[i]);
    const ratio = arTokens > 0 ? (idlmTokens / arTokens).toFixed(2) : "many";
    if (differs === undefined) {
      this.#say(`Identical: all ${length} tokens. I-DLM was ${ratio} times as fast.`, "same");
    } else {
      this.#say(`The texts differ from token ${differs + 1} on.`, "differs");
    }
  }

  #busy(racing) {
    this.#running = racing;
    this.start.disabled = racing !== null;
    this.stopButton.hidden = racing === null;
  }

  #say(text, kind) {
    this.verdict.textContent = text;
    this.verdict.className = kind;
  }
}
