// The page: signing in with a key, its views by the fragment of the URL, and what all of them show.

import { account } from './account.js';
import { ApiError, get, setKey } from './api.js';
import { h, labelled } from './dom.js';
import { errorPanel } from './errors.js';
import { credits } from './format.js';
import { current, limits } from './limits.js';
import { models } from './models.js';
import { playground } from './playground.js';
import { usage } from './usage.js';

const VIEWS = { playground, usage, models, account };
const STORED = 'pomelo.key';

const content = document.getElementById('content');
const navigation = document.getElementById('views');
const status = document.getElementById('status');

let shown = 0;
let entered = null;  // the key, as long as the page is open: the browser may forbid storage

/** Returns what an action on the browser's storage returns; null if the browser forbids it. */
function tryStorage(action) {
  try { return action(); } catch { return null; }
}

/** Shows the view that the URL names, or the form that asks for a key. */
async function show() {
  const key = tryStorage(() => sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED)) ?? entered;
  const turn = ++shown;
  navigation.hidden = status.hidden = !key;
  if (!key) {
    document.title = 'Pomelo';
    content.replaceChildren(signIn());
    return;
  }
  setKey(key);
  const [name, query = ''] = location.hash.replace(/^#\/?/, '').split('?');
  const view = VIEWS[name] ? name : 'playground';
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · Pomelo`;
  for (const link of navigation.children) {
    if (link.hash === `#/${view}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  if (!content.querySelector('h1')) content.replaceChildren(h('p', { class: 'dim' }, 'Loading…'));
  content.setAttribute('aria-busy', 'true');
  let element;
  try {
    element = await VIEWS[view](new URLSearchParams(query), { key, signOut });
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (turn !== shown) return;  // of a view that was left; the key may be another by now
    if (error.code === 'invalid_api_key') {
      forget();
      element = signIn(error);
    } else {
      element = h('div', { class: 'card' }, errorPanel(error, showAndFocus));
    }
  }
  if (turn !== shown) return;
  content.removeAttribute('aria-busy');
  content.replaceChildren(element);
}

function forget() {
  entered = null;
  tryStorage(() => sessionStorage.removeItem(STORED));
  tryStorage(() => localStorage.removeItem(STORED));
  navigation.hidden = status.hidden = true;
}

/** As `show`, for an action whose own button or link may disappear with the focus. */
async function showAndFocus() {
  await show();
  content.focus();
}

function signOut() {
  forget();
  return showAndFocus();
}

function signIn(error = null) {
  const key = h('input', { type: 'password', autocomplete: 'off', required: true, spellcheck: 'false', placeholder: 'pml_test_…' });
  const remember = h('input', { type: 'checkbox', id: 'remember' });
  const problem = h('div', {}, error ? errorPanel(error) : null);
  const submit = h('button', { class: 'primary', type: 'submit' }, 'Continue');
  const form = h('form', { class: 'card stack sign-in', onsubmit: async (event) => {
    event.preventDefault();
    const value = key.value.trim();
    if (!value) return key.focus();
    setKey(value);
    try {
      // A header can't have other characters, so the browser would not send it.
      if (!/^[!-~]+$/.test(value)) throw new ApiError({ code: 'invalid_api_key', message: 'A key has ASCII letters, digits and _ alone.' });
      await get('api/v1/account');
    } catch (refusal) {
      problem.replaceChildren(errorPanel(refusal));
      return key.focus();
    }
    entered = value;
    tryStorage(() => sessionStorage.setItem(STORED, value));
    if (remember.checked) tryStorage(() => localStorage.setItem(STORED, value));
    return showAndFocus();
  } },
    h('h1', {}, 'Enter your API key'),
    h('p', { class: 'dim' }, 'Keys begin with pml_test_ (answered by the sandbox) or pml_live_. Your operator creates them; ',
      h('code', {}, 'pomelo serve'), ' keeps a test key in its data folder.'),
    labelled('API key', key),
    h('label', { class: 'check', for: 'remember' }, remember, 'Remember on this device'),
    problem,
    submit);
  return form;
}

/** Shows the mode and the credits beside the views. */
function showStatus() {
  const mode = current['Pomelo-Mode'];
  const left = current['Credits-Remaining'];  // null: the store could not be asked
  status.replaceChildren(
    h('span', { class: `badge ${mode}` }, mode),
    left == null ? '' : h('span', { class: 'amount' }, `${credits(left)} credits`));
}

const theme = document.getElementById('theme');
theme.value = document.documentElement.dataset.theme;
theme.addEventListener('change', () => {
  document.documentElement.dataset.theme = theme.value;
  tryStorage(() => localStorage.setItem('pomelo.theme', theme.value));
  dispatchEvent(new Event('themechange'));
});

limits.addEventListener('change', showStatus);
content.addEventListener('signout', signOut);
document.querySelector('.skip').addEventListener('click', (event) => {
  event.preventDefault();  // its fragment would be taken for the name of a view
  content.focus();
});
addEventListener('hashchange', showAndFocus);
show();
