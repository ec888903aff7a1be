"""Check the built documentation: links, texts of images, and how pages look in a browser.

Links and texts need no browser. With a Chromium (``chromium``, ``google-chrome``, or
``CHROMIUM=PATH``) each page is opened at 1280 and at 400 pixels: nothing may stick out of
the page, code and the list of titles must fit at 1280, words of tables stay whole, and
every formula and image must show, offline. In the light and in the dark theme text stands
out from what is behind it, and images have a ground of their own. A browser that does not
start or end here is said, and is no problem of the pages.

Example: python docs/check.py docs/_build/html
"""

import contextlib
import functools
import html
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1280, 400)
CONTRAST = 3  # of text over what is behind it, by the definition of WCAG 2
SECONDS = 420


class Page(html.parser.HTMLParser):
    """Links, anchors and images of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.images = [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "img":
            self.images.append((found.get("src", ""), found.get("alt")))
        target = found.get("href") if tag in ("a", "link") else found.get("src")
        if target:
            self.links.append(target)


def check_files(folder):
    """Links within the site that lead nowhere, and images without a text."""
    # Listings of code and the theme's templates are made by Sphinx.
    made = {"_modules", "_static"}
    paths = [p for p in sorted(folder.rglob("*.html")) if not made & {*p.parts}]
    pages = {path: Page(path) for path in paths}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        # Sphinx takes the name of the file where there is no text.
        problems += [
            f"{name}: image {s} has no alt text"
            for s, alt in page.images
            if not alt or s.endswith(alt)
        ]
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            if not target.exists():
                problems.append(f"{name}: no file for {link}")
            elif parts.fragment and target in pages:
                anchor = urllib.parse.unquote(parts.fragment)
                if anchor not in pages[target].anchors:
                    problems.append(f"{name}: no anchor for {link}")
    return problems


# In the browser

SCRIPT = """
<!doctype html><meta charset="utf-8"><pre id="found">waiting</pre><script>
const pages = PAGES, widths = WIDTHS, found = [];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
function scrolls(element, top) {
  for (let e = element; e && e !== top; e = e.parentElement) {
    const flow = getComputedStyle(e).overflowX;
    if (flow === "auto" || flow === "scroll" || flow === "hidden") return true;
  }
  return false;
}
const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgba(draw) {
  pixel.clearRect(0, 0, 1, 1);
  draw(pixel);
  return [...pixel.getImageData(0, 0, 1, 1).data];
}
const shades = {};
function shade(color) {
  return (shades[color] ??= rgba((c) => { c.fillStyle = color; c.fillRect(0, 0, 1, 1); }));
}
function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    const color = shade(getComputedStyle(e).backgroundColor);
    if (color[3] > 250) return color;
  }
  return [255, 255, 255, 255];
}
function luminance(color) {
  const [r, g, b] = color.slice(0, 3).map((v) =>
    v <= 10 ? v / 3295 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort();
  return (y + 0.05) / (x + 0.05);
}
function read(page, theme, frame) {
  const doc = frame.contentDocument, article = doc.querySelector("article") || doc.body;
  doc.documentElement.dataset.theme = theme;
  const say = (what) => found.push(`${page} in ${theme}: ${what}`);
  for (const e of article.querySelectorAll("*")) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data);
    const words = text.join("").trim().slice(0, 40), style = getComputedStyle(e);
    if (!/\\w/.test(words) || style.visibility === "hidden" || !e.offsetParent) continue;
    const found = contrast(shade(style.color), ground(e));
    if (found < CONTRAST) say(`contrast of text is ${found.toFixed(1)}: ${words}`);
  }
  for (const e of article.querySelectorAll("img")) {
    const corner = e.naturalWidth ? rgba((c) => c.drawImage(e, 0, 0)) : [0, 0, 0, 255];
    const own = shade(getComputedStyle(e).backgroundColor);
    if (Math.max(corner[3], own[3]) < 250)
      say(`image has no ground: ${e.getAttribute("src")}`);
  }
}
function broken(cell) {
  const doc = cell.ownerDocument, walker = doc.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const range = doc.createRange(), found = [];
  for (let node; (node = walker.nextNode()); )
    for (const word of node.data.matchAll(/[\\w.]+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const tops = [...range.getClientRects()].map((box) => Math.round(box.top));
      if (new Set(tops).size > 1) found.push(`a word of a table is broken: ${word[0]}`);
    }
  return found;
}
function look(page, width, frame) {
  const doc = frame.contentDocument, article = doc.querySelector("article") || doc.body;
  const say = (what) => found.push(`${page} at ${width}: ${what}`);
  const root = doc.documentElement;
  if (root.scrollWidth > width + 1) say(`the page is ${root.scrollWidth} pixels wide`);
  for (const e of article.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    const text = (e.textContent || e.src || "").trim().slice(0, 40);
    if (box.right > width + 1 && !e.firstElementChild && !scrolls(e, doc.body))
      say(`${e.tagName.toLowerCase()} sticks out: ${text}`);
    if (width >= 1000 && e.tagName === "PRE" && e.scrollWidth > e.clientWidth + 1)
      say(`code is ${e.scrollWidth - e.clientWidth} pixels too wide: ${text}`);
  }
  for (const cell of article.querySelectorAll("td, th")) broken(cell).forEach(say);
  const list = doc.querySelector(".bd-sidebar-secondary");
  if (list && width >= 1000)
    for (const e of list.querySelectorAll("a"))
      if (e.getBoundingClientRect().right > width + 1)
        say(`the list of titles is cut: ${e.textContent.trim()}`);
  for (const e of article.querySelectorAll("img"))
    if (!e.naturalWidth) say(`image does not show: ${e.getAttribute("src")}`);
  for (const e of article.querySelectorAll(".math"))
    if (!e.querySelector("mjx-container") || e.querySelector("[data-mjx-error]"))
      say(`formula does not show: ${e.textContent.slice(0, 40)}`);
}
(async () => {
  for (const width of widths) for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:900px;border:0`;
    frame.src = page;
    const loaded = new Promise((done) => (frame.onload = done));
    document.body.appendChild(frame);
    await loaded;
    const view = frame.contentWindow;
    if (frame.contentDocument.querySelector(".math")) {
      for (let i = 0; i < 100 && !(view.MathJax && view.MathJax.startup); i++) await wait(50);
      if (view.MathJax && view.MathJax.startup) await view.MathJax.startup.promise;
    }
    for (const e of frame.contentDocument.querySelectorAll("img")) {
      e.loading = "eager";
      if (!e.complete) await Promise.race([e.decode().catch(() => 0), wait(2000)]);
    }
    look(page, width, frame);
    if (width === Math.max(...widths)) ["light", "dark"].forEach((t) => read(page, t, frame));
    frame.remove();
  }
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site, and one page that opens the others."""

    def do_GET(self):
        if self.path != "/check":
            super().do_GET()
            return
        body = self.server.script.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder, pages):
    """The address of the site on this machine, while it lasts."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    server.script = SCRIPT.replace("PAGES", json.dumps(pages), 1)
    server.script = server.script.replace("WIDTHS", json.dumps(WIDTHS), 1)
    server.script = server.script.replace("CONTRAST", str(CONTRAST), 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def check_browser(folder, chromium):
    """What sticks out or does not show, page by page."""
    skipped = {"genindex.html", "search.html", "py-modindex.html"}
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.html"))]
    pages = [n for n in names if n not in skipped and not n.startswith("_")]
    with served(folder, pages) as address, tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            # Nothing from outside: the site has to be whole by itself.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
            f"--virtual-time-budget={1000 * SECONDS}",
            "--dump-dom",
            f"{address}/check",
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"pages were not opened: {error}")
            return []
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    if text is None or text[1] == "waiting":
        print(f"pages were not opened: the browser ended with {done.stderr[-300:]}")
        return []
    print(f"{len(pages)} pages opened at {' and '.join(map(str, WIDTHS))} pixels")
    return json.loads(html.unescape(text[1]))


def find_chromium():
    """The path of a browser, or None."""
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else NAMES
    return next(filter(None, map(shutil.which, names)), None)


def main(folder):
    folder = pathlib.Path(folder).resolve()
    if not (folder / "index.html").exists():
        raise SystemExit(f"{folder} holds no built documentation; run make docs first.")
    problems = check_files(folder)
    chromium = find_chromium()
    if chromium is None:
        print("no Chromium is found: links and texts of images alone were checked")
    else:
        problems += check_browser(folder, chromium)
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(f"{len(problems)} problems")
    print("no problems")


if __name__ == "__main__":
    main(sys.argv[1])
