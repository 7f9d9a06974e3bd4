// A plan of the server's as bars and figures.

import { $, element } from "./elements.js";
import { figures, shownBytes, shownSeconds } from "./units.js";

// what the time of a step goes to
const PARTS = {
  weights: "reading the weights", KV: "reading KV on the device", compute: "arithmetic", "host link": "link to host memory",
  "host memory": "host memory that GPUs share", disk: "reading the disk", "peer links": "links between ranks",
  network: "network between nodes", "fixed work": "fixed work",
};

export function showPlan(plan) {
  $("found").classList.remove("stale");
  $("result").hidden = false;
  $("verdict").textContent = verdict(plan);
  $("verdict").className = plan.fits && !isTooLong(plan) ? "fits" : "lacks";
  $("figures").replaceChildren(...headline(plan).flatMap(([name, text]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", text));
    return pair;
  }));
  $("tiers").replaceChildren(...bars(plan).map(tierBar));
  showCosts(plan);
  $("advice").replaceChildren(...(plan.advice.length ? plan.advice : ["Nothing: all of it fits."]).map((text) => element("li", "", text)));
  $("command").textContent = plan.command ?? "";
  $("serving").hidden = plan.command === null;
  const times = plan.hardware.is_measured
    ? "Times are estimates, by rates that were measured here"
    : "Times are lower bounds, by rates that are the most the hardware can do";
  $("sources").textContent =
    `${plan.hardware.name}: ${plan.hardware.source}. ${times}, with every request at its full context.`;
}

// what was found is no longer what is asked for, and why there is nothing newer
export function showFailure(message) {
  $("found").classList.add("stale");
  $("verdict").className = "lacks";
  $("verdict").textContent = message;
}

// whether memory is not all that counts
function isTooLong({ request, model }) {
  return request.context > model.most_positions;
}

function verdict(plan) {
  const { running, request, decode, model } = plan;
  if (!decode) return `Nothing runs, limited by ${plan.capacity_limit}.`;
  const who = plan.fits
    ? request.concurrency === 1 ? "The request fits" : `All ${request.concurrency.toLocaleString("en")} requests fit`
    : `${running.toLocaleString("en")} of ${request.concurrency.toLocaleString("en")} requests fit, limited by ${plan.capacity_limit}`;
  if (isTooLong(plan)) {
    const most = model.most_positions.toLocaleString("en");
    return `${who}, but ${model.name} was made for ${most} positions, and the engine refuses more.`;
  }
  return `${who}. A step is bound by ${part(decode.limit)}.`;
}

function headline(plan) {
  const { decode, first_token: first } = plan;
  const longest = plan.tiers.reduce((sum, tier) => sum + tier.tokens, 0);
  return [
    ["per token", decode ? shownSeconds(decode.seconds) : "–"],
    ["first token", first ? shownSeconds(first.seconds) : "–"],
    ["tokens/s", decode ? figures(plan.tokens_per_second) : "–"],
    ["requests that fit", plan.most_requests.toLocaleString("en")],
    ["tokens that fit", longest.toLocaleString("en")],
    ["KV of a request", shownBytes(plan.kv_bytes_per_request)],
    ...(plan.request.kv_cache_dtype === "auto" ? [] : [
      ["KV of a token below the device", shownBytes(plan.cold_kv_bytes_per_token)],
    ]),
    ...(plan.share_read === 1 ? [] : [["of a request's pages a token reads", `${figures(100 * plan.share_read)} %`]]),
  ];
}

// each a tier: its parts are [kind, name, bytes]
function bars(plan) {
  const rank = plan.ranks.reduce((least, one) => (one.left / one.page_bytes < least.left / least.page_bytes ? one : least));
  const [device, ...below] = plan.tiers;
  const pages = rank.page_bytes, used = device.used_pages * pages, spare = (device.pages - device.used_pages) * pages;
  const parts = [
    ["weights", "weights", rank.weights],
    ["work", "workspace of a step", rank.workspace],
    ["work more", "driver and libraries", rank.context],
    ["ring", "staging ring", rank.staging],
    ["device", "KV", used],
    ["free", "free for KV", spare],
  ];
  const taken = parts.reduce((sum, [, , size]) => sum + size, 0);
  const size = plan.ranks.length, isCpu = plan.hardware.is_cpu;
  const kind = isCpu ? "CPU memory" : "Device";
  const memory = plan.hardware.memory_bytes / (isCpu ? size : 1); // ranks on a CPU share it
  return [
    {
      title: size === 1 ? kind : `${kind} of rank ${rank.rank}, the fullest of ${size}`,
      parts: [...parts, ["kept", "not used", memory - taken]],
      lacking: Math.max(0, -rank.left), tier: device,
    },
    ...below.map((tier) => {
      const one = tier.page_bytes;
      const asked = plan.request[`${tier.name}_kv_bytes`];
      const parts = [[tier.name, "KV", tier.used_pages * one], ["free", "free for KV", (tier.pages - tier.used_pages) * one]];
      return {
        title: tier.name === "host" ? "Host memory, all ranks" : "Disk, all ranks",
        parts: [...parts, ["kept", tier.pages ? "read-ahead and rounding" : "not used", asked - tier.num_bytes]],
        lacking: 0, tier,
      };
    }),
  ];
}

function tierBar({ title, parts, lacking, tier }) {
  const shown = parts.filter(([, , size]) => size > 0);
  const total = shown.reduce((sum, [, , size]) => sum + size, 0);
  const box = element("div", `tier-bar ${tier.name}`), head = element("h3", "", title), bar = element("div", "bar"), list = element("ul", "legend");
  const held = `${tier.tokens.toLocaleString("en")} tokens, ${tier.requests.toLocaleString("en")} whole requests`;
  head.append(element("span", "", lacking ? `${shownBytes(total)}, ${shownBytes(lacking)} more than may be used` : total ? `${shownBytes(total)}; KV: ${held}` : "none"));
  bar.setAttribute("aria-hidden", "true"); // the list says the same
  for (const [kind, name, size] of shown) {
    const part = element("i", kind), line = element("li"), swatch = element("i", kind);
    part.style.flexGrow = size / total;
    part.dataset.bytes = size;
    part.title = `${name}: ${shownBytes(size)}`;
    bar.append(part);
    line.append(swatch, `${name} `, element("b", "", shownBytes(size)));
    list.append(line);
  }
  if (lacking) {
    const end = element("u");
    end.style.width = `${(100 * (total - lacking)) / total}%`;
    bar.append(end);
  }
  box.classList.toggle("lacking", lacking > 0);
  box.classList.toggle("none", !total);
  box.append(head, bar, list);
  return box;
}

function showCosts({ decode, hardware }) {
  $("costs-note").textContent = !decode ? "" : hardware.is_cpu
    ? "the longer of memory (weights and KV) and arithmetic; the rest comes on top"
    : "the longest of memory (weights and KV), arithmetic, link, host memory and disk; what ranks send comes on top"
      + (decode.micro_batches > 1 || decode.idle ? `, and stages follow each other: each waits ${figures(100 * decode.idle)} % of a step` : "");
  const parts = decode ? Object.entries(decode.parts).filter(([, seconds]) => seconds > 0) : [];
  const most = Math.max(...parts.map(([, seconds]) => seconds));
  $("costs").replaceChildren(...parts.map(([name, seconds]) => {
    const row = element("li", name === decode.limit ? "cost binds" : "cost"), bar = element("div", "bar"), filled = element("i");
    bar.setAttribute("aria-hidden", "true");
    filled.style.width = `${(100 * seconds) / most}%`;
    bar.append(filled);
    row.append(element("span", "name", name === decode.limit ? `${part(name)}: binds` : part(name)), bar, element("b", "", shownSeconds(seconds)));
    return row;
  }));
  if (!decode) $("costs").append(element("li", "", "Nothing runs."));
}

function part(name) {
  return PARTS[name] ?? name;
}
