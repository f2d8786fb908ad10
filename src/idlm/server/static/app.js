// The page: which view is shown, the settings and the served model.

import { servedModel } from "./api.js";
import { Chat } from "./chat.js";
import { Race } from "./race.js";

const KEY = "idlm-api-key";
const form = document.getElementById("settings");
const fields = form.elements;
const settingsButton = document.getElementById("settings-button");
let model = null;

function number(field) {
  return field.value === "" ? undefined : Number(field.value);
}

function settings() {
  return {
    key: fields.key.value,
    temperature: number(fields.temperature),
    max_tokens: number(fields.max_tokens),
    seed: number(fields.seed),
    stride: number(fields.stride),
    verification: fields.verification.value,
  };
}

function showSettings(shown) {
  form.hidden = !shown;
  settingsButton.setAttribute("aria-expanded", String(shown));
}

function how({ layout, stride }) {
  return stride === "auto" ? "layout and stride chosen by cost" : `layout ${layout}, stride ${stride}`;
}

async function connect() {
  const line = document.getElementById("model");
  try {
    model = await servedModel(fields.key.value);
    line.textContent = `${model.id}, ${how(model)}`;
    fields.stride.placeholder = model.stride;
    fields.verification.value = model.verification;
  } catch (error) {
    line.textContent = error.message;
    if (error.status === 401) {
      showSettings(true);
      fields.key.focus();
    }
  }
}

const views = { chat: new Chat(settings), race: new Race(settings, () => model) };

// No element has the id of a view's hash: the browser would move the focus there.
function show(name) {
  for (const button of document.querySelectorAll("[data-view]")) {
    const current = button.dataset.view === name;
    document.getElementById(`${button.dataset.view}-view`).hidden = !current;
    if (current) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
  document.querySelector(`#${name}-view textarea`).focus();
}

for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => show(button.dataset.view));
}
window.addEventListener("hashchange", () => show(location.hash === "#race" ? "race" : "chat"));
settingsButton.addEventListener("click", () => showSettings(form.hidden));
form.addEventListener("submit", (event) => event.preventDefault());
fields.key.value = sessionStorage.getItem(KEY) ?? "";
fields.key.addEventListener("change", () => {
  sessionStorage.setItem(KEY, fields.key.value);
  connect();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const view of Object.values(views)) view.stop();
});

show(location.hash === "#race" ? "race" : "chat");
connect();
