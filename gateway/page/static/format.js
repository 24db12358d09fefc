// Numbers and times as people read them.

const number = new Intl.NumberFormat('en');
const clock = new Intl.DateTimeFormat('en', { dateStyle: 'medium', timeStyle: 'short' });

export const count = (value) => number.format(value);

/** Credits keep all their digits, at most 6 after the point: amounts are exact. */
export const credits = (value) => new Intl.NumberFormat('en', { maximumFractionDigits: 6 }).format(value);

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

export const bytes = (size) =>
  size < 1024 ? `${size} B` : size < 1048576 ? `${Math.round(size / 1024)} KiB` : `${(size / 1048576).toFixed(1)} MiB`;

/** Times break into lines only between the day and the hour. */
export const time = (unixSeconds) => clock.format(unixSeconds * 1000).replaceAll(/ (?!\d+:)/g, '\u00a0');

/** Names of the API as words: million_input_tokens is "million input tokens", text-to-speech "text to speech". */
export const words = (name) => name.replaceAll(/[-_]/g, ' ');
