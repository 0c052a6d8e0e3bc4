"""Chromium without a window: what a page shows, at which width, and what its console said."""

import functools
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What came of a page: the text that the script gave, and the lines of the console."""

    text: str
    console: list[str]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over http, on a port of its own; gives the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def look(folder: Path, page: str, script: str, *, width: int = 390, dark: bool = False, over_http: bool = True) -> Seen:
    """Show a page in a frame of this width, as narrow as Chromium's own window never is, and run a script beside it.

    Args:
        folder: Where the page lies.
        page: Its path there, with a fragment if it needs one.
        script: The body of a function of `page` (the frame's window) and `doc`; what it returns is the text.
        width: Of the frame, in CSS pixels.
        dark: Whether the user prefers dark colours.
        over_http: Served, as by an object store; else as a file.
    """
    frame = f'<iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe>'
    code = f"function look(page, doc) {{ {script} }}\nonload = () => setTimeout(() => {{ const out = document."
    code += "createElement('pre'); out.id = 'out'; out.textContent = look(frames[0], frames[0].document); "
    code += "document.body.append(out) }, 500)"
    (folder / "look.html").write_text(f"{frame}<script>{code}</script>")
    colours = ["--blink-settings=preferredColorScheme=0"] if dark else []
    if over_http:
        with served(folder) as address:
            done = chromium(folder, f"{address}/look.html", *colours)
    else:
        done = chromium(folder, (folder / "look.html").as_uri(), "--allow-file-access-from-files", *colours)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return Seen(found[1], re.findall(r"CONSOLE.*", done.stderr))


def chromium(folder: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Show a page; its DOM at the end is what was written to stdout, its console is in stderr."""
    command = ["chromium", *OPTIONS, *options, f"--user-data-dir={folder}/.profile", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)


CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
const light = rgb => rgb.map(channel).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
const read = text => text.match(/[\\d.]+/g).map(Number)
const ground = node => { for (; node; node = node.parentElement) {
  const c = read(page.getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3) }
  return [255, 255, 255] }
let worst = [99, '']
for (const node of doc.body.querySelectorAll('*')) {
  const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()), style = page.getComputedStyle(node)
  const is_seen = style.visibility !== 'hidden' && node.getClientRects().length
  if (!own || !is_seen || /SCRIPT|STYLE/.test(node.tagName)) continue
  const ink = read(node.namespaceURI.includes('svg') ? style.fill : style.color).slice(0, 3)
  const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05)
  if (ratio < worst[0]) worst = [ratio, node.tagName + ' ' + node.className]
}
return worst.join(' ')
"""
"""The least contrast of any text on the page with what is behind it, and where."""
