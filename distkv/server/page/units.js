// Sizes and times as people read and write them.

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

// tokens of "4096", "4k" or "1M", where k is 1024; NaN for another text
export function readTokens(text) {
  const [, figure, unit] = text.match(/^\s*(\d+(?:\.\d+)?)\s*([km]?)\s*$/i) ?? [];
  return figure === undefined ? NaN : Number(figure) * 1024 ** ["", "k", "m"].indexOf(unit.toLowerCase());
}

// bytes of "4096", "512GiB" or "2TB"; NaN for another text
export function readBytes(text) {
  const [, figure, unit, binary] = text.match(/^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$/i) ?? [];
  if (figure === undefined) return NaN;
  return Number(figure) * (binary ? 1024 : 1000) ** ["", "k", "m", "g", "t"].indexOf(unit.toLowerCase());
}

export function shownBytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < BYTES.length - 1; unit++) count /= 1024;
  return `${count.toFixed(unit === 0 || count >= 100 ? 0 : count >= 10 ? 1 : 2)} ${BYTES[unit]}`;
}

export function shownSeconds(seconds) {
  if (seconds < 10) return `${figures(1e3 * seconds)} ms`;
  if (seconds < 600) return `${figures(seconds)} s`;
  return seconds < 36000 ? `${figures(seconds / 60)} min` : `${figures(seconds / 3600)} h`;
}

// three of them, never with an exponent
export function figures(value) {
  if (value >= 100 || value === 0) return value.toFixed(0);
  return value.toFixed(Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(value)))));
}
