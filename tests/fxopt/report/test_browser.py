"""The HTML report in a real Chromium: what is drawn, where, and what keys and clicks do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxopt.report.memory import find_holdings
from fxopt.report.records import Report
from fxopt.report.units import format_bytes

OTHERS = ("gemma2", "qwen3_moe", "qlora")
NAMES = (
    pytest.param("llama", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS),
)
DRAWN = (
    "llama",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "qlora")),
    pytest.param("gemma2", marks=pytest.mark.exhaustive),
)

OVERLAPS = """() => {
  const found = [];
  for (const side of ["before", "after"]) {
    const boxes = [...document.querySelectorAll(`#${side} .node rect`)].map((rect) => rect.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
      if (a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5)
        found.push([side, a.x, a.y, b.x, b.y]);
    }));
  }
  return found;
}"""
TOO_LONG = """() => [...document.querySelectorAll("#before .node, #after .node")].filter((node) => {
  const width = node.querySelector("rect").width.baseVal.value;
  return [...node.querySelectorAll("text")].some((text) => text.getComputedTextLength() + 9 > width);
}).map((node) => node.textContent)"""
STACKED = """() => {
  const boxes = [...document.querySelectorAll("header, main > section")].map((part) => part.getBoundingClientRect());
  return boxes.slice(1).every((box, i) => box.top >= boxes[i].bottom - 0.5);
}"""
WIDER_THAN_PAGE = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(
                "no Chromium, neither on the path nor playwright's own; "
                "apt-get install chromium, or playwright install chromium"
            )
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=NAMES)
def page(
    request: pytest.FixtureRequest,
    browser: Any,
    report_of: Callable[[str], Report],
    tmp_path: Path,
) -> Iterator[Any]:
    """Open the report of one model from disk, with the network cut; errors of the page fail the test."""
    path = tmp_path / "report.html"
    report_of(request.param).save_html(path)
    context = browser.new_context(viewport={"width": 1500, "height": 1000}, offline=True)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(path.as_uri())
    yield opened
    context.close()
    assert problems == []


@pytest.mark.slow
def test_hostile_names_run_nothing(browser: Any, hostile: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    hostile.save_html(path)
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.locator("#modules button").first.click()
    page.locator("#before .node").first.hover()
    page.locator("#before .node").first.click()
    assert page.evaluate("() => document.querySelectorAll('img, script[src]').length") == 0
    assert page.evaluate("() => document.scripts.length") == 3
    assert "alert(1)" in page.inner_text("h1"), "the name is shown as it is"
    page.close()
    assert dialogs == []


def count(page: Any, selector: str) -> int:
    return page.locator(selector).count()


@pytest.mark.parametrize("page", DRAWN, indirect=True)
def test_everything_is_drawn_and_nothing_overlaps(page: Any) -> None:
    for place in range(count(page, "#graph option")):
        page.select_option("#graph", str(place))
        graph = f"JSON.parse(document.getElementById('data').textContent).graphs[{place}]"
        for side in ("before", "after"):
            expected = page.evaluate(f"() => {graph}.cells.filter((cell) => cell.{side}).length")
            assert expected > 3
            assert count(page, f"#{side} .node") == expected
            assert count(page, f"#{side} .edge") == len(page.evaluate(f"() => {graph}.{side}"))
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(TOO_LONG) == []
    assert page.evaluate(STACKED)
    assert not page.evaluate(WIDER_THAN_PAGE)
    page.select_option("#graph", "0")


def test_data_flows_from_left_to_right(page: Any) -> None:
    backwards = page.evaluate(
        """() => [...document.querySelectorAll("#before .edge")].filter((edge) => {
          const x = (id) => document.querySelector(`#before [data-box="${id}"]`).getBoundingClientRect().left;
          return x(edge.dataset.from) >= x(edge.dataset.to);
        }).length"""
    )
    assert backwards == 0


def test_both_panels_show_the_same_place_and_what_stayed_stands_still(page: Any) -> None:
    places = """(side) => Object.fromEntries([...document.querySelectorAll(`#${side} .node`)]
      .map((node) => [node.dataset.box, node.getAttribute("transform")]))"""
    before, after = page.evaluate(places, "before"), page.evaluate(places, "after")
    shared = before.keys() & after.keys()
    assert len(shared) > 3
    assert all(before[box] == after[box] for box in shared)
    page.click("#zoom-in")
    boxes = [page.get_attribute(f"#{side}", "viewBox") for side in ("before", "after")]
    assert boxes[0] == boxes[1]


def test_what_went_leaves_its_outline(page: Any) -> None:
    """After the rewrites, where a node of before has none in its place, an outline stands that is no node."""
    graph = "JSON.parse(document.getElementById('data').textContent).graphs[0]"
    gone = page.evaluate(f"() => {graph}.cells.filter((cell) => cell.before && !cell.after).length")
    assert count(page, "#after .ghost") == gone > 3
    assert count(page, "#before .ghost") == 0


def test_an_op_that_came_is_in_sight_at_first(page: Any) -> None:
    seen = page.evaluate(
        """() => { const panel = document.getElementById("after").getBoundingClientRect();
          return [...document.querySelectorAll("#after .came")].map((node) => node.getBoundingClientRect())
            .filter((box) => box.left >= panel.left && box.right <= panel.right + 1
              && box.top >= panel.top && box.bottom <= panel.bottom).length; }"""
    )
    assert seen > 0


MEMORY = """() => {
  const box = (found) => found.getBoundingClientRect();
  const bars = [...document.querySelectorAll(".instant")];
  const tops = bars.map((bar) => Math.min(...[...bar.querySelectorAll(".part")].map((part) => box(part).top)));
  const place = tops.indexOf(Math.min(...tops));
  const marked = box(document.querySelector(".memory .peak")).left;
  return { bars: bars.length, place, distance: Math.abs(box(bars[place].querySelector(".hit")).left - marked),
    told: bars[place].querySelector("title").textContent,
    label: document.querySelector(".memory .strong").textContent };
}"""


def test_the_memory_of_a_step_shows_its_peak_and_what_holds_it(
    page: Any, request: pytest.FixtureRequest, report_of: Callable[[str], Report]
) -> None:
    (plan,) = report_of(request.node.callspec.params["page"]).plans
    shown = page.evaluate(MEMORY)
    of_regions = 2 * (len(plan.layers) + len(plan.after))
    is_tied = any("before the blocks" in instant.name for instant in plan.timeline)
    assert shown["bars"] == len(plan.timeline) == of_regions + is_tied + 1
    peak = plan.timeline[shown["place"]]
    assert peak.bytes == plan.peak_bytes
    assert shown["distance"] < 1, "the bar that is marked is the highest"
    assert shown["label"] == f"peak {format_bytes(peak.bytes)}, {plan.peak_at}"
    assert shown["told"].startswith(f"{plan.peak_at}: {format_bytes(peak.bytes)}\n")
    rows = page.locator(".holds table").first.inner_text()
    for holding in find_holdings(plan, peak):
        assert not holding.bytes or f"{holding.title}\t{format_bytes(holding.bytes)}\t" in rows
    assert "weights, buffers and the optimizer's state" in rows


def test_the_parts_of_the_page_are_linked(page: Any) -> None:
    targets = page.evaluate("() => [...document.querySelectorAll('nav a')].map((link) => link.hash.slice(1))")
    assert targets == ["graphs", "sites", "proofs", "memory", "layers", "running", "code"]
    page.locator("nav a", has_text="Memory").click()
    assert page.evaluate("() => document.getElementById('memory').getBoundingClientRect().top") < 200


def test_search_finds_and_dims(page: Any) -> None:
    page.locator("body").press("/")
    page.keyboard.type("linear")
    hits = count(page, "#before .node.hit")
    assert 0 < hits < count(page, "#before .node")
    assert page.inner_text("#found").endswith("found")
    page.keyboard.press("Enter")
    assert count(page, "#before .node.selected") + count(page, "#after .node.selected") > 0
    page.fill("#search", "nothing is called so")
    assert page.inner_text("#found") == "0 found"


def test_escape_leaves_the_search_as_it_was_before(page: Any) -> None:
    page.locator("#fit").focus()
    page.keyboard.press("/")
    page.keyboard.type("linear")
    page.keyboard.press("Escape")
    assert page.input_value("#search") == page.inner_text("#found") == ""
    assert count(page, ".node.hit") == 0
    assert page.evaluate("() => document.activeElement.id") == "fit"
    page.locator("#search").focus()
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.id") == "before"


def test_a_module_folds_and_unfolds(page: Any) -> None:
    whole = count(page, "#before .node")
    chip = page.locator("#modules button", has_text="mlp").first
    chip.click()
    assert count(page, "#before .node.fold") == 1
    folded = count(page, "#before .node")
    assert folded < whole
    assert page.evaluate(OVERLAPS) == []
    page.locator("#before").focus()
    page.keyboard.press("Enter")  # the fold is selected
    assert count(page, "#before .node") == whole


def test_keys_walk_and_zoom(page: Any) -> None:
    page.locator("#before").focus()
    page.keyboard.press("ArrowRight")
    first = page.get_attribute("#before .node.selected", "data-box")
    page.keyboard.press("ArrowRight")
    assert page.locator(".node.selected").first.get_attribute("data-box") != first
    assert page.inner_text("#detail")
    before = page.get_attribute("#before", "viewBox")
    page.keyboard.press("+")
    assert page.get_attribute("#before", "viewBox") != before
    assert page.evaluate("() => document.activeElement.id") == "before"


TIP = """() => {
  const tip = document.getElementById("tip"), box = tip.getBoundingClientRect();
  if (tip.hidden) return null;
  const node = document.querySelector("#after .node.selected") || document.querySelector("#before .node.selected");
  const place = node.getBoundingClientRect();
  const gap = Math.max(box.top - place.bottom, place.top - box.bottom);
  return { lines: tip.innerText.split("\\n"), gap, title: node.querySelector("text").textContent,
    inside: box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight };
}"""


def test_walking_by_keys_tells_what_pointing_does(page: Any) -> None:
    page.locator("#after").focus()
    page.keyboard.press("ArrowRight")
    seen = set()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        shown = page.evaluate(TIP)
        assert shown["lines"][0] in (f"op: {shown['title']}", f"input: {shown['title']}")
        assert 0 <= shown["gap"] < 20, "beside its node"
        assert shown["inside"]
        seen.add("\n".join(shown["lines"]))
    assert len(seen) > 2
    page.keyboard.press("Enter")
    assert page.evaluate(TIP)["lines"][0].endswith("Enter unfolds it.")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    page.locator("#search").focus()
    assert page.locator("#tip").is_hidden()


def test_an_input_tells_its_form_and_bytes(page: Any) -> None:
    page.locator("#before .node.input").first.hover()
    lines = page.inner_text("#tip").splitlines()
    assert lines[0].startswith("input: ")
    assert any(re.fullmatch(r"holds: [\d.]+ \w+", line) for line in lines)
    assert not any(line.startswith(("op: ", "stands for: ")) for line in lines)


PHONE: Any = {"width": 420, "height": 900}
CUT_OFF = """() => [...document.querySelectorAll("main :is(td, h2, h3, p, button, select, input), header *")]
  .filter((part) => {
  if (part.closest(".chips, pre, details:not([open])")) return false;
  const box = part.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 1;
}).map((part) => part.outerHTML.slice(0, 120))"""


def test_a_narrow_page_cuts_nothing_off(page: Any) -> None:
    page.set_viewport_size(PHONE)
    assert not page.evaluate(WIDER_THAN_PAGE)
    assert page.evaluate(CUT_OFF) == []
    row = page.locator("#sites tbody tr").first
    titles = row.evaluate(
        "(row) => [...row.cells].map((cell) => getComputedStyle(cell, '::before').content.slice(1, -1))"
    )
    assert titles == ["form", "became", "layers", "status", "module", "source", "reason, or what serves it"]
    tops = row.evaluate("(row) => [...row.cells].slice(0, 4).map((cell) => cell.getBoundingClientRect().top)")
    assert tops == sorted(set(tops)), "one below the other"
    assert page.evaluate("() => document.getElementById('before').getBoundingClientRect().height") < 400
    for side in ("before", "after"):
        assert (
            page.evaluate(f"() => getComputedStyle(document.getElementById('{side}')).touchAction") == "pan-y"
        )


def test_regions_are_told_apart_by_their_names(page: Any) -> None:
    names = page.locator(".tiles .name").all_inner_texts()
    assert "the tail" in names
    assert not any(name in ("model", "the model", "(model)") for name in names)
    assert page.locator("#graph option").last.inner_text().strip() == "the tail, capture 0"


def test_pointing_at_a_node_tells_its_form_and_source(page: Any) -> None:
    page.locator("#before .node.op").first.hover()
    tip = page.inner_text("#tip")
    assert "form: " in tip
    assert "source: " in tip
    assert ".py:" in tip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        """() => ["color", "backgroundColor"].map((name) => getComputedStyle(document.body)[name]
          .match(/[0-9]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"""
    )
    assert abs(colours[0] - colours[1]) > 0.6
    assert (colours[1] > 0.5) == (scheme == "light")


WHOLE_ON_PAPER = """() => {
  const strips = [...document.querySelectorAll(".strip")].map((strip) => [strip, strip.getBoundingClientRect()]);
  const whole = new Set();
  let least = Infinity;
  for (const [strip, frame] of strips) for (const node of strip.querySelectorAll(".node")) {
    const box = node.querySelector("rect").getBoundingClientRect();
    if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom) continue;
    whole.add(node.dataset.box);
    least = Math.min(least, 12 * frame.width / strip.viewBox.baseVal.width);
  }
  return { whole: [...whole].sort(), least, widest: Math.max(...strips.map(([, frame]) => frame.right)) };
}"""
BOXES = """() => [...new Set([...document.querySelectorAll("#before .node, #after .node")]
  .map((node) => node.dataset.box))].sort()"""
PAPER: Any = {"width": 718, "height": 1000}
"""A page of A4 within its margins."""


def test_print_shows_the_whole_graph_and_all_code(page: Any) -> None:
    drawn = page.evaluate(BOXES)
    page.set_viewport_size(PAPER)
    page.emulate_media(media="print")
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open]):not(.guards)").count() == 0
    assert not any(page.locator(part).first.is_visible() for part in (".tools", "nav", ".screen", ".panels"))
    assert page.locator(".memory").is_visible()
    shown = page.evaluate(WHOLE_ON_PAPER)
    assert shown["whole"] == drawn, "no node is cut through"
    assert shown["least"] > 6.5, "pixels of a node's text"
    assert shown["widest"] <= PAPER["width"]
    assert page.pdf()[:4] == b"%PDF"
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert count(page, ".strip") == 0


@pytest.mark.slow
def test_links_in_a_notebook_stay_in_their_frame(
    browser: Any, report_of: Callable[[str], Report], tmp_path: Path
) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<p>a cell</p>{report_of('llama')._repr_html_()}")
    page = browser.new_page(viewport={"width": 1000, "height": 600})
    page.goto(path.as_uri())
    (frame,) = page.main_frame.child_frames
    frame.locator("nav a", has_text="Memory").click()
    page.wait_for_function("() => true")
    top = "() => document.getElementById('memory').getBoundingClientRect().top"
    assert frame.evaluate(top) < 200
    assert frame.evaluate("() => document.title") == "fxopt report: LlamaForCausalLM"
    assert page.evaluate("() => document.querySelector('iframe').getBoundingClientRect().height") < 600
    assert page.evaluate("() => document.styleSheets.length") == 0, "the report's style stays within"
    page.close()
