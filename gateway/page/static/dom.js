// Elements without markup in strings: text from users and models is never parsed as HTML.

/** Returns a new element. `on…` properties are listeners, `class`, `aria-…` and the like attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'value') element.value = value;
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

let ids = 0;

/** Returns an id that no other element has. */
export const newId = (prefix) => `${prefix}-${++ids}`;

/** Returns a label above a control, with an optional hint that screen readers read as its description. */
export function labelled(text, control, hint = '', className = '') {
  control.id ||= newId('field');
  const note = hint ? h('p', { class: 'hint', id: `${control.id}-hint` }, hint) : null;
  if (note) control.setAttribute('aria-describedby', note.id);
  return h('div', { class: `field ${className}`.trim() }, h('label', { for: control.id }, text), control, note);
}

/** Returns a button that copies a text; null where browsers do not allow it: without HTTPS, on other machines. */
export function copyButton(text) {
  if (!navigator.clipboard) return null;
  const button = h('button', { type: 'button', class: 'quiet', onclick: async () => {
    const isCopied = await navigator.clipboard.writeText(text()).then(() => true, () => false);
    button.textContent = isCopied ? 'Copied' : 'The browser refused';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  } }, 'Copy');
  return button;
}

/** Returns a list of facts: pairs of a name and a text or an element; those without a value are left out. */
export function facts(pairs) {
  return h('dl', { class: 'facts' }, pairs.filter(([, value]) => value != null && value !== '')
    .map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))));
}

/**
 * Returns a table in a box that scrolls sideways. `numbers` are the columns with numbers, `header` is the one that names
 * its row; `empty` is said without rows. The roles keep it a table for screen readers where a style stacks its cells.
 */
export function table(name, columns, rows, { numbers = [], header = 0, className = '', empty = 'None.' } = {}) {
  const style = (i) => numbers.includes(i) && 'number';
  const cell = (value, i) => (i === header
    ? h('th', { scope: 'row', role: 'rowheader' }, value)
    : h('td', { class: style(i), role: 'cell' }, value));
  const body = rows.map((row) => h('tr', { role: 'row' }, row.map(cell)));
  return h('div', { class: 'scroll', tabindex: 0, role: 'group', 'aria-label': name },
    h('table', { class: className, role: 'table' },
      h('thead', { role: 'rowgroup' }, h('tr', { role: 'row' },
        columns.map((text, i) => h('th', { scope: 'col', role: 'columnheader', class: style(i) }, text)))),
      h('tbody', { role: 'rowgroup' }, body.length ? body : h('tr', { role: 'row' }, h('td', { role: 'cell', class: 'dim', colspan: columns.length }, empty)))));
}
