// Not a module: it runs before the first paint, so that a chosen theme does not flash.
document.documentElement.dataset.theme = 'system';
try {
  document.documentElement.dataset.theme = localStorage.getItem('pomelo.theme') ?? 'system';
} catch { /* the browser forbids storage */ }
