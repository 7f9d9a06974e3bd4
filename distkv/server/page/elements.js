// What the pages have in common.

export const $ = (id) => document.getElementById(id);

// of the server; an address that has the key in it, as a browser takes it, is not for scripts
export const serverUrl = (path) => new URL(path, location.href);

export function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}
