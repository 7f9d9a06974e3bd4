// What the pages have in common.

export const $ = (id) => document.getElementById(id);

export function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}
