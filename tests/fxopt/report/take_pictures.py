"""The pictures of docs/report.md, taken anew by hand: `.venv/bin/python tests/fxopt/report/take_pictures.py`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from fxopt.offline import Setting, report_offline

OUT = Path(__file__).parents[3] / "docs" / "images"
SIZE: Any = {"width": 1500, "height": 1000}
QLORA = Setting(None, "llama", "10GiB", 1, 4096, True, "H100", True)
SETTINGS = {
    "llama": Setting(None, "llama", "auto", 1, 4096, False, "H100"),
    "gemma2": Setting(None, "gemma2", "auto", 1, 4096, False, "H100"),
    "qwen3_moe": Setting(None, "qwen3_moe", "auto", 1, 4096, False, "H100"),
    "qlora": QLORA,
}


def prepare(page: Page, name: str) -> None:
    """Bring the page to what its picture is to show."""
    if name == "gemma2":
        page.fill("#search", "rope")
        page.press("#search", "Enter")
    if name == "qwen3_moe":
        page.locator("#modules button", has_text="self_attn").first.click()
        page.click("#stack")


def main() -> None:
    """Write one picture of each report, and one of a plan's memory."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, setting in SETTINGS.items():
            file = Path(folder) / f"{name}.html"
            report_offline(setting).save_html(file)
            size: Any = {**SIZE, "height": 1240} if name == "qwen3_moe" else SIZE
            page = browser.new_page(viewport=size, color_scheme="dark" if name == "gemma2" else "light")
            page.goto(file.as_uri())
            prepare(page, name)
            page.screenshot(path=str(OUT / f"report_{name}.png"))
            if name == "qlora":
                page.locator("#memory").screenshot(path=str(OUT / "report_memory.png"))
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
