// The live picture: what /live tells twice a second.

import { $, element, serverUrl } from "./elements.js";

const NUM_CELLS = 96, NUM_SAMPLES = 240, RETRY = 2000;
const TIERS = [
  { name: "device", title: "Device", what: "attention reads it where it lies" },
  { name: "host", title: "Host", what: "pinned CPU memory" },
  { name: "disk", title: "Disk", what: "Zarr in the cache folder" },
];
// what moves between a tier and the one above it; streamed slices do not stay
const FLOWS = [
  null,
  { down: ["device_to_host"], up: ["host_to_device", "host_streamed"] },
  { down: ["host_to_disk"], up: ["disk_to_host", "disk_streamed"] },
];
const speeds = [];
const views = TIERS.map((tier, index) => makeTier(tier, FLOWS[index]));

connect();

function connect() {
  const source = new EventSource(serverUrl("live"));
  source.onmessage = (event) => show(JSON.parse(event.data));
  source.onerror = () => {
    source.close(); // by itself it would not try again after a status such as 503
    state("down", "no answer; trying again");
    fetch(serverUrl("health")).then((found) => found.ok || found.json().then((body) => state("down", body.error.message)), () => {});
    setTimeout(connect, RETRY);
  };
}

function show(sample) {
  state("up", "serving");
  $("model").textContent = sample.model;
  $("speed").textContent = Math.round(sample.tokens_per_second).toLocaleString();
  $("running").textContent = sample.running;
  $("waiting").textContent = sample.waiting;
  $("in-use").textContent = sample.pages_in_use.toLocaleString();
  $("idle").textContent = sample.idle_pages.toLocaleString();
  speeds.push(sample.tokens_per_second);
  if (speeds.length > NUM_SAMPLES) speeds.shift();
  chart();
  views.forEach((view, index) => view(sample.tiers[TIERS[index].name], sample));
}

function state(kind, text) {
  $("state").className = `state ${kind}`;
  $("state").textContent = text;
}

function chart() {
  const peak = Math.max(...speeds, 1), from = NUM_SAMPLES - speeds.length;
  const points = speeds.map((speed, index) => `${from + index + 1},${(46 - (44 * speed) / peak).toFixed(1)}`);
  const [area, line] = $("chart").children;
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M${from + 1},48L${points.join("L")}L${NUM_SAMPLES},48Z`);
  $("peak").textContent = `peak ${Math.round(peak).toLocaleString()}`;
}

function makeTier(tier, flow) {
  const lanes = flow && [makeLane("down", flow.down), makeLane("up", flow.up)];
  if (lanes) {
    const row = element("div", "flow");
    row.append(...lanes.map((lane) => lane.box));
    $("tiers").append(row);
  }
  const box = element("div", `tier ${tier.name}`), title = element("h2", "", tier.title), figure = element("span");
  const cells = element("div", "cells");
  cells.append(...Array.from({ length: NUM_CELLS }, () => element("i")));
  title.append(figure);
  box.title = tier.what;
  box.append(title, cells);
  $("tiers").append(box);
  return (found, sample) => {
    box.classList.toggle("none", !found.capacity);
    figure.textContent = found.capacity
      ? `${found.pages.toLocaleString()} of ${found.capacity.toLocaleString()} pages, ` +
        `${bytes(found.bytes)} of ${bytes(found.capacity_bytes)}`
      : "none";
    const filled = found.capacity ? (NUM_CELLS * found.pages) / found.capacity : 0;
    [...cells.children].forEach((cell, index) => {
      cell.className = index + 1 <= filled ? "on" : index < filled ? "part" : "";
    });
    const pageBytes = found.capacity_bytes / found.capacity; // codes have fewer than on the device, where there are any
    lanes?.forEach((lane) => lane.show(sample, pageBytes));
  };
}

function makeLane(direction, routes) {
  const box = element("div", direction), text = element("span");
  box.append(element("span", "lane"), text);
  return {
    box,
    show: (sample, pageBytes) => {
      const speed = routes.reduce((sum, route) => sum + (sample.bytes_per_second[route] ?? 0), 0);
      box.classList.toggle("moving", speed > 0);
      const pages = pageBytes ? speed / pageBytes : 0; // NaN of a tier that is not there
      text.textContent = `${direction === "down" ? "↓" : "↑"} ${bytes(speed)}/s, ${pages.toFixed(pages < 10 ? 1 : 0)} pages/s`;
    },
  };
}

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}
