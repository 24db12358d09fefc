// Shows /openapi.json. Requests go to the server that this page comes from, whatever its public URL is.
const base = new URL(".", location.href);
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = null; // chosen on the page at `/`
try {
  theme = localStorage.getItem("pomelo.theme");
} catch { /* the browser forbids storage */ }
const follow = () =>
  document.documentElement.classList.toggle("dark-mode", theme === "dark" || (theme !== "light" && dark.matches));
dark.addEventListener("change", follow);
follow();

const response = await fetch(new URL("openapi.json", base));
const spec = await response.json();
spec.servers = [{ url: base.href.replace(/\/$/, "") }];
SwaggerUIBundle({
  spec,
  domNode: document.getElementById("reference"),
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null,
});
document.getElementById("page").hidden = !(await fetch(base, { method: "HEAD" })).ok; // POMELO_PAGE=0: no page
