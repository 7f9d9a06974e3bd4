// The chat box: a conversation held by this page, answered by /v1/chat/completions as it comes.

import { $, element, serverUrl } from "./elements.js";

const talk = $("talk"), form = $("form"), question = $("question"), send = $("send");
const hint = talk.firstElementChild;
let messages = [];
let running = null; // the AbortController of the answer that is being written

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (question.value.trim()) ask(question.value.trim());
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  talk.replaceChildren(hint);
  question.focus();
});

async function ask(text) {
  hint.remove();
  question.value = "";
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  say("user", text);
  const answer = say("assistant busy", "");
  const stopper = (running = new AbortController());
  send.textContent = "Stop";
  let written = "", usage = null, first = 0;
  try {
    const body = {
      messages: conversation, stream: true, stream_options: { include_usage: true },
      temperature: Number($("temperature").value), max_completion_tokens: Number($("most").value),
    };
    const response = await fetch(serverUrl("v1/chat/completions"), {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
      signal: stopper.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response.body)) {
      if (data.error) throw new Error(data.error.message);
      if (data.usage) usage = data.usage;
      const piece = data.choices[0]?.delta.content;
      if (!piece) continue;
      first ||= performance.now();
      written += piece;
      show(answer, written);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.classList.add("failed");
      show(answer, written + (written ? "\n" : "") + error.message);
    }
  }
  answer.classList.remove("busy");
  if (written) conversation.push({ role: "assistant", content: written });
  else conversation.pop();
  if (usage) remark(answer, usage, first ? (performance.now() - first) / 1000 : 0);
  if (running === stopper) {
    running = null;
    send.textContent = "Send";
  }
}

// the data of server-sent events, up to [DONE]
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

function say(kind, text) {
  const box = element("div", `said ${kind}`, text);
  talk.append(box);
  talk.scrollTop = talk.scrollHeight;
  return box;
}

function show(box, text) {
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  box.textContent = text;
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

function remark(box, usage, seconds) {
  const speed = seconds > 0 ? `, ${Math.round((usage.completion_tokens - 1) / seconds)} per second` : "";
  const cached = usage.prompt_tokens_details.cached_tokens;
  const told = `${cached} of ${usage.prompt_tokens} tokens of the prompt were cached`;
  box.append(element("small", "", `${usage.completion_tokens} tokens${speed}; ${told}`));
  talk.scrollTop = talk.scrollHeight;
}
