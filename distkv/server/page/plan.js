// The planner: what the controls say is asked of the server, and is in the address, so that a plan can be shared.

import { $, serverUrl } from "./elements.js";
import { FIELDS, MORE, makeControl } from "./plan_controls.js";
import { showFailure, showPlan } from "./plan_view.js";

const PATIENCE = 60; // milliseconds without a move, after which the server is asked
const fields = [...FIELDS, ...MORE];
let controls = [], choices = null, timer = 0, asking = null;

begin().catch((error) => showFailure(error.message));

async function begin() {
  choices = await answer("plan/choices");
  $("chat").hidden = !choices.has_chat;
  controls = fields.map((field) => makeControl(field, choices, changed));
  $("fields").append(...controls.slice(0, FIELDS.length).map((one) => one.box));
  $("more-fields").append(...controls.slice(FIELDS.length).map((one) => one.box));
  const told = new URLSearchParams(location.search);
  const unknown = [...told.keys()].filter((name) => !fields.some((field) => field.name === name));
  // what an address of this page's does not have is left to the server
  const isLeft = (name) => told.has("model") && MORE.some((field) => field.name === name);
  show((name) => told.get(name) ?? (isLeft(name) ? left(name) : start(name)));
  $("more").open = controls.slice(FIELDS.length).some(isGiven);
  $("form").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    show(start);
    ask();
  });
  copies("share", "Link copied", () => location.href);
  copies("copy", "Copied", () => $("command").textContent);
  if (unknown.length) showFailure(`The address has ${unknown.join(", ")}, which no plan takes; leave it out.`);
  else await ask();
}

// what a control begins with
function start(name) {
  return String(choices.start[name] ?? left(name));
}

// the same where it is left to the server
function left(name) {
  return name === "dtype" ? choices.defaults.dtype : "";
}

function show(text) {
  for (const control of controls) control.text = text(control.name);
}

function changed() {
  clearTimeout(timer);
  timer = setTimeout(ask, PATIENCE);
}

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  history.replaceState(null, "", `?${address()}`);
  for (const control of controls) control.complain("");
  try {
    showPlan(await answer("plan", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body()), signal: mine.signal,
    }));
  } catch (error) {
    if (mine.signal.aborted) return;
    showFailure(error.message);
    const wrong = controls.findIndex(({ name }) => name === error.param || error.message.startsWith(`${name} `));
    controls[wrong]?.complain(error.message);
    if (wrong >= FIELDS.length) $("more").open = true;
  }
}

// the JSON that the server answers; its error where it is one
async function answer(path, options) {
  const response = await fetch(serverUrl(path), options).catch(() => {
    throw new Error("The server does not answer; see if it still runs.");
  });
  const found = await response.json().catch(() => null); // as a proxy before the server may answer
  if (response.ok && found) return found;
  const { message, param } = found?.error ?? { message: `The answer is not the planner's (status ${response.status}).` };
  throw Object.assign(new Error(message), { param });
}

function given() {
  return controls.filter(isGiven);
}

// the server has defaults for the rest
function isGiven(control) {
  return control.text !== "" && !(control.name === "dtype" && control.text === "auto");
}

function address() {
  return new URLSearchParams(given().map((control) => [control.name, control.text])).toString();
}

function body() {
  return Object.fromEntries(given().map(({ name, text }) => {
    const isNumber = fields.find((field) => field.name === name).whole && Number.isFinite(Number(text));
    return [name, isNumber ? Number(text) : text];
  }));
}

function copies(id, done, text) {
  const button = $(id), label = button.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = done;
    } catch {
      button.textContent = "The browser does not let pages copy";
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
}
