// The controls of a plan. Each has a text, which is what the server is sent, and may be moved on a ladder of such texts.

import { element } from "./elements.js";
import { readBytes, readTokens } from "./units.js";

// 1, 2, 3, 4, 6, 8, 12, ... up to a number
function steps(most) {
  const found = [1];
  for (let size = 2; size <= most; size *= 2) found.push(size, ...(size * 1.5 <= most ? [size * 1.5] : []));
  return found;
}

// of bytes, from so many GiB to so many
function sizes(first, last) {
  return ["0", ...steps(last / first).map((size) => {
    const gib = size * first;
    return gib < 1 ? `${gib * 1024}MiB` : gib < 1024 ? `${gib}GiB` : `${gib / 1024}TiB`;
  })];
}

const CONTEXTS = steps(4096).map((size) => (size < 1024 ? `${size}k` : `${size / 1024}M`));

// `whole` fields are numbers in JSON where their text is one
export const FIELDS = [
  { name: "model", label: "Model", options: (choices) => choices.models.map(modelOption) },
  { name: "gpu", label: "Runs on", options: (choices) => choices.gpus.map(gpuOption), byHand: "memory=48GiB,bandwidth=900GB,matrix=200T,link=32GB" },
  { name: "tensor_parallel_size", label: "Tensor-parallel ranks", whole: true, read: Number, ladder: () => steps(128).map(String) },
  { name: "context", label: "Context, tokens of a request", read: readTokens, ladder: () => CONTEXTS },
  { name: "concurrency", label: "Requests at a time", whole: true, read: Number, ladder: () => steps(2048).map(String) },
  { name: "kv_cache_dtype", label: "KV below the device", options: (choices) => choices.kv_cache_dtypes.map(dtypeOption("the model's dtype")) },
  { name: "host_kv_bytes", label: "Host memory for KV", read: readBytes, ladder: () => sizes(1 / 16, 8192) },
  { name: "disk_kv_bytes", label: "Disk for KV", read: readBytes, ladder: () => sizes(1, 131072) },
];
export const MORE = [
  { name: "dtype", label: "Model dtype", options: (choices) => choices.dtypes.map(dtypeOption("the checkpoint's")) },
  { name: "attention_policy", label: "Attention policy", hint: "full, or top_pages(share=0.1)", isLong: true },
  { name: "device_kv_bytes", label: "Device memory for KV", hint: "auto" },
  { name: "disk_bandwidth", label: "Disk reads, per second", hint: "auto" },
  { name: "pipeline_parallel_size", label: "Pipeline stages, of the ranks above", whole: true },
  { name: "decode_context_parallel_size", label: "Ranks that share a request's tokens", whole: true },
  { name: "nodes", label: "Machines, which the ranks fill", whole: true },
  { name: "node", label: "One of them", hint: "gpus=8,memory=1TiB,bandwidth=614GB,network=400GB", isLong: true },
  { name: "cpu_attention", label: "Pages that the CPU attends to", hint: "off, auto or a share" },
  { name: "page_size", label: "Tokens of a page", whole: true },
  { name: "max_num_seqs", label: "Most answers at a time", whole: true, hint: "auto" },
  { name: "max_num_batched_tokens", label: "Most tokens of a step", whole: true },
  { name: "gpu_memory_utilization", label: "Share of the device's memory", whole: true },
];

function modelOption(model) {
  return { value: model.name, text: `${model.name}${model.is_served ? ", served here" : ""}` };
}

function gpuOption(gpu) {
  return { value: gpu.name, text: gpu.title };
}

function dtypeOption(whose) {
  return (value) => ({ value, text: value === "auto" ? `auto (${whose})` : value });
}

// Makes the control of a field; `changed` is called when somebody moves it. Its `text` is "" where it is left out.
export function makeControl(field, choices, changed) {
  const box = element("div", "field");
  const make = field.options ? makeSelect : field.ladder ? makeSlider : makeText;
  const control = make(field, choices, box, changed);
  const complaint = element("p", "complaint");
  complaint.id = `${field.name}-complaint`;
  box.append(complaint);
  return {
    box,
    name: field.name,
    get text() { return control.text(); },
    set text(text) { control.show(text); },
    // what is wrong with it, or "" for nothing
    complain(message) {
      complaint.textContent = message;
      box.classList.toggle("wrong", Boolean(message));
      for (const input of box.querySelectorAll("input, select")) {
        if (message) input.setAttribute("aria-invalid", "true");
        else input.removeAttribute("aria-invalid");
        input.setAttribute("aria-describedby", complaint.id);
      }
    },
  };
}

function makeSelect(field, choices, box, changed) {
  const select = element("select"), byHand = element("input", "by-hand");
  select.id = field.name;
  select.append(...field.options(choices).map(option));
  box.append(label(field), select);
  if (field.byHand) {
    select.append(option({ value: field.byHand, text: "by hand" }));
    byHand.setAttribute("aria-label", `${field.label}, by hand`);
    byHand.addEventListener("input", changed);
    box.append(byHand);
  }
  select.addEventListener("change", () => {
    show(select.value);
    changed();
  });

  function show(text) {
    const isByHand = Boolean(field.byHand) && text.includes("=");
    // a name that only the server understands, from the address
    if (!isByHand && ![...select.options].some((one) => one.value === text)) select.append(option({ value: text, text }));
    select.value = isByHand ? field.byHand : text;
    byHand.hidden = !isByHand;
    byHand.value = isByHand ? text : "";
  }
  return { text: () => (field.byHand && !byHand.hidden ? byHand.value : select.value), show };
}

function makeSlider(field, choices, box, changed) {
  const slider = element("input"), exact = element("input", "exact"), row = element("div", "names");
  const ladder = field.ladder();
  Object.assign(slider, { id: field.name, type: "range", min: 0, max: ladder.length - 1, step: 1 });
  Object.assign(exact, { type: "text", inputMode: "text", autocomplete: "off", spellcheck: false });
  exact.setAttribute("aria-label", `${field.label}, exactly`);
  slider.addEventListener("input", () => {
    exact.value = ladder[slider.value];
    slider.setAttribute("aria-valuetext", exact.value);
    changed();
  });
  exact.addEventListener("input", () => {
    place();
    changed();
  });
  row.append(label(field), exact);
  box.append(row, slider);

  function place() {
    const wanted = field.read(exact.value.trim());
    if (Number.isNaN(wanted)) return;
    const far = ladder.map((text) => Math.abs(Math.log1p(field.read(text)) - Math.log1p(wanted)));
    slider.value = far.indexOf(Math.min(...far));
    slider.setAttribute("aria-valuetext", exact.value);
  }
  return {
    text: () => exact.value.trim(),
    show: (text) => {
      exact.value = text;
      place();
    },
  };
}

function makeText(field, choices, box, changed) {
  const input = element("input", field.isLong ? "by-hand" : "exact"), row = element("div", field.isLong ? "" : "names");
  Object.assign(input, { id: field.name, type: "text", autocomplete: "off", spellcheck: false, placeholder: field.hint ?? choices.defaults[field.name] ?? "" });
  input.addEventListener("input", changed);
  row.append(label(field), input);
  box.append(row);
  return { text: () => input.value.trim(), show: (text) => (input.value = text) };
}

function label(field) {
  const made = element("label", "", field.label);
  made.htmlFor = field.name;
  made.title = field.name; // as advice and errors call it
  return made;
}

function option({ value, text }) {
  const made = element("option", "", text);
  made.value = value;
  return made;
}
