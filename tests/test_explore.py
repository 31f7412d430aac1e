"""The page in which a reader moves the equations: its functions are sotglp.py's, its numbers the model's."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image

from conftest import PROJECT, random_clip
from extras import explore, visualize
from methods import METHODS
from methods.gallop import top_k_mean
from sinkhorn import sinkhorn
from sotglp import SOTGLP, fuse, global_logits, local_logits, saliency, sparse_support

NAMES = ["sea", "</script><script>window.harm = 1</script>", "red clay", "a & b", "{{policy}}", "wood",
         "\u2028 \"x\""]
HOME, END, RIGHT, DOWN = "\ue011", "\ue010", "\ue014", "\ue015"       # keys, as WebDriver names them


@pytest.fixture(scope="module")
def equations():
    """What calls the page's own functions in node: equations((name, argument, ...), ...) -> their values."""
    if shutil.which("node") is None:
        pytest.skip("no node here")
    code = re.search("<script>(.*?)</script>", explore.TEMPLATE.read_text(encoding="utf-8"), re.S)[1]
    names = re.findall(r"^function (\w+)", code, re.M)
    code += f"""
        const functions = {{{', '.join(names)}}};
        require("readline").createInterface({{input: process.stdin}}).on("line", (line) =>
          console.log(JSON.stringify(JSON.parse(line).map(([name, ...rest]) => functions[name](...rest)))));
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["node", "-e", code], **pipes) as process:
        def call(*calls):
            calls = [[part.tolist() if torch.is_tensor(part) else part for part in call] for call in calls]
            print(json.dumps(calls), file=process.stdin, flush=True)
            values = json.loads(process.stdout.readline())
            return [torch.tensor(value, dtype=torch.float64) for value in values]

        yield call
        process.stdin.close()


def assert_close(found, expected, rtol=1e-6):
    torch.testing.assert_close(found, expected.double(), rtol=rtol, atol=1e-12, check_dtype=False)


# ---- the page's functions

@pytest.mark.parametrize("P, L, K, epsilon, n_iters", [
    (16, 4, 5, 0.1, 20), (16, 4, 1, 0.1, 3), (9, 3, 9, 0.1, 1), (9, 1, 4, 0.1, 2), (1, 1, 1, 0.1, 1),
    (16, 4, 5, 0.01, 200), (16, 2, 16, 10.0, 20)])
def test_the_pages_transport_is_sotglps(equations, P, L, K, epsilon, n_iters):
    similarity = 2 * torch.rand(P, L, dtype=torch.float64) - 1
    kept, patches = (part[0, 0] for part in sparse_support(similarity[None, None], K))
    order = saliency(kept).argsort(descending=True)
    kept, patches = kept[order], patches[order]
    plan = sinkhorn(1 - kept, epsilon=epsilon, n_iters=n_iters)
    salient, support, found, terms = equations(
        ("saliency", similarity), ("support", saliency(similarity), K),
        ("sinkhorn", 1 - kept, epsilon, 2 * n_iters), ("phi", plan, kept))
    assert_close(salient, saliency(similarity))
    assert support.tolist() == patches.tolist()
    assert_close(found, plan)
    assert_close(terms, (plan * kept).sum(dim=0))


def test_equal_cosines_give_the_uniform_plan(equations):
    even = torch.full((6, 2), 0.3)
    plan, steps = equations(("sinkhorn", 1 - even, 0.01, 2), ("support", saliency(even), 4))
    assert_close(plan, torch.full((6, 2), 1 / 12))
    assert len(set(steps.tolist())) == 4


def test_half_steps_set_the_rows_then_the_columns(equations):
    cost = torch.rand(5, 3)
    rows, columns = equations(("sinkhorn", cost, 0.1, 1), ("sinkhorn", cost, 0.1, 2))
    assert_close(rows.sum(dim=1), torch.full((5,), 1 / 5))
    assert (rows.sum(dim=0) - 1 / 3).abs().max() > 1e-3
    assert_close(columns.sum(dim=0), torch.full((3,), 1 / 3))


def test_the_pages_scores_are_sotglps(equations):
    image, text = torch.randn(1, 8), torch.randn(3, 4, 8)
    image, text = image / image.norm(), text / text.norm(dim=-1, keepdim=True)
    cosines = torch.einsum("bd,cgd->cg", image, text)
    similarity, local = torch.rand(9, 3), torch.randn(1, 3)
    expected = global_logits(image, text, 14.0)
    *found, probabilities, means = equations(
        *(("globalLogit", row, 14.0) for row in cosines),
        *(("fuse", expected[0, c].item(), local[0, c].item(), 0.4) for c in range(3)),
        ("softmax", 1000 * local[0]), ("topKMean", similarity, [1, 4, 9]))
    assert_close(torch.stack(found[:3]), expected[0])
    assert_close(torch.stack(found[3:]), fuse(expected, local, 0.4)[0])
    assert_close(probabilities, (1000 * local[0].double()).softmax(dim=0))
    assert_close(means, top_k_mean(similarity[None, None], [1, 4, 9])[0, 0])


# ---- the numbers in the page

def page_of(model, n=2, truth=6):
    """The page of a model with n random pictures -> its text, its numbers, the pictures."""
    torch.manual_seed(5)
    images, texts = torch.randn(n, 3, 32, 32), model.encode_prompts()
    pictures = [explore.look(model, texts, image, f"<b>{i}", truth) for i, image in enumerate(images)]
    text = explore.page({"run": "a run", **explore.described(model), "pictures": pictures}, "../P A.md")
    data = re.search('<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    return text, json.loads(data, object_hook=unpacked), images


def unpacked(fields):
    """What the page makes of packed numbers, as lists; all else as it is."""
    if "float32" not in fields:
        return fields
    return torch.frombuffer(bytearray(base64.b64decode(fields["float32"])), dtype=torch.float32).view(
        fields["shape"]).tolist()


@pytest.mark.parametrize("method, options", [
    ("sotglp", {"n_support": 5, "epsilon": 0.02, "n_iters": 3}), ("released", {"n_support": 3}),
    ("dense", {}), ("plot", {}), ("gallop", {"top_k": (1, 3, 5, 20)}), ("independent", {"n_support": 3})])
def test_at_the_settings_of_the_run_the_page_shows_the_runs_own_numbers(equations, method, options):
    model = METHODS[method](random_clip(), NAMES, **options).eval()
    _, data, images = page_of(model)
    has, settings = data["parts"], data["settings"]
    with torch.no_grad():
        texts = model.encode_prompts()
        scores = model.scores(model(images[1:], None, texts))
    picture = data["pictures"][1]
    assert picture["labels"][:5] == next(iter(scores.values()))[0].topk(5).indices.tolist()
    assert set(picture["labels"][5:]) <= {6} and 6 in picture["labels"]
    assert has["own"] == (method in ("gallop", "independent")) == (not has["plan"])
    for i, label in enumerate(picture["labels"]):
        similarity = torch.tensor(picture["similarity"][i])
        if has["plan"]:
            seen = visualize.look(model, images[1:], texts, label)
            kept = similarity[equations(("support", saliency(similarity), settings["K"]))[0].long()]
            plan, = equations(("sinkhorn", 1 - kept, settings["epsilon"], 2 * settings["iterations"]))
            torch.testing.assert_close(plan.float(), seen.plan, rtol=1e-4, atol=0)
            terms, = equations(("phi", plan, kept))
        else:
            terms = equations(("topKMean", similarity, data["top_k"]))[0] / len(data["top_k"])
        local = scores["local"][0, label].item()
        assert data["local_scale"] * terms.sum().item() == pytest.approx(local, rel=1e-4)
        assert picture["local"][label] == pytest.approx(local, abs=1e-6)
        if method != "plot":
            value, = equations(("globalLogit", picture["cosines"][i], data["global_scale"]))
            assert value.item() == pytest.approx(scores["global"][0, label].item(), rel=1e-4)
            final, = equations(("fuse", value.item(), local, settings["lambda"]))
            final = final / 2 if has["halved"] else final
            assert final.item() == pytest.approx(scores["fused"][0, label].item(), rel=1e-4)


@pytest.mark.parametrize("method", ["coop", "locoop"])
def test_a_method_with_a_global_score_alone_shows_that(method):
    model = METHODS[method](random_clip(), NAMES).eval()
    _, data, images = page_of(model)
    picture = data["pictures"][0]
    assert not any(data["parts"].values()) and "local" not in picture
    with torch.no_grad():
        expected = model(images[:1])[0][0]
    assert picture["global"] == pytest.approx(expected.tolist(), abs=1e-5)
    logit = picture["global"][picture["labels"][1]]
    assert data["global_scale"] * picture["cosines"][1][0] == pytest.approx(logit, rel=1e-4)


def test_a_method_without_patches_is_refused():
    with pytest.raises(ValueError, match="compares no patches"):
        page_of(METHODS["promptot"](random_clip(), NAMES).eval())


def test_names_are_text_and_the_page_may_load_nothing():
    text, data, _ = page_of(SOTGLP(random_clip(), NAMES, n_support=3).eval())
    assert data["class_names"] == NAMES and data["pictures"][0]["name"] == "<b>0"
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 3
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.count("sha256-") == 2
    template = explore.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|https?://|@import|url\((?!#)", template)


def test_every_equation_links_to_its_section():
    headings = re.findall("^#+ (.*)$", explore.PAPER.read_text(encoding="utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall('href="PAPER.md#(.*?)"', explore.TEMPLATE.read_text(encoding="utf-8"))
    assert len(linked) == 7 and set(linked) <= anchors
    assert explore.page({}, "../P A.md").count('href="../P%20A.md#') == 7
    assert 'href="file:///C:/a/PAPER.md#' in explore.page({}, "file:///C:/a/PAPER.md")


# ---- the command

def write(*options):
    explore.main(explore.parse_args([*map(str, options), "--device", "cpu"]))


def test_the_command_replaces_the_page_whole(trained, tmp_path, capsys):
    page = tmp_path / "new" / "some.html"
    for count in (1, 2):
        write(trained, "--count", count, "--output", page)
        data = json.loads(re.search('id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
        assert len(data["pictures"]) == count and data["settings"]["K"] == 5
        assert [path.name for path in page.parent.iterdir()] == ["some.html"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {page}, ")
    link = re.search('href="(.*?)#symbols"', page.read_text(encoding="utf-8"))[1]
    assert (page.parent / link).resolve() == PROJECT / "PAPER.md"


def test_a_picture_that_cannot_be_read_is_named_and_nothing_is_written(trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    images, page = (tmp_path / "good.png", tmp_path / "broken.png"), tmp_path / "a.html"
    with pytest.raises(SystemExit, match="cannot read picture .*broken.png"):
        write(trained, "--images", *images, "--output", page)
    assert not page.exists()


@pytest.mark.parametrize("options", [["run", "--count", "0"], ["run", "--output", "run/last.pt"], [],
                                     ["run", "--images", "a.png", "--split", "val"]])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(SystemExit, match="2"):
        explore.parse_args(options)


# ---- in a browser

class Browser:
    """Chromium as its driver offers it over HTTP, with the few things that a reader does."""

    def __init__(self, port, chromium):
        self.address = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        wanted = {"goog:chromeOptions": {"args": arguments, "binary": chromium},
                  "goog:loggingPrefs": {"browser": "ALL"}}
        self.address += "/" + self.ask("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def ask(self, path, method="POST", **fields):
        request = urllib.request.Request(self.address + path, json.dumps(fields).encode(), method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, file, text):
        """Opens a page as a file, as wide as a telephone."""
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        self.ask("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        file.write_text(text, encoding="utf-8")
        self.ask("/url", url=file.as_uri())

    def js(self, code):
        return self.ask("/execute/sync", script=f"return {code}", args=[])

    def shown(self, selector):
        """The text of the first element of this kind."""
        return self.js(f"document.querySelector({selector!r}).textContent").strip().replace("\u202f", " ")

    def element(self, selector):
        reference = self.ask("/element", using="css selector", value=selector)
        return "/element/" + next(iter(reference.values()))

    def click(self, selector):
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        self.ask(self.element(selector) + "/click")

    def press(self, selector, keys):
        self.ask(self.element(selector) + "/value", text=keys)

    def errors(self):
        return self.ask("/se/log", type="browser")


@pytest.fixture(scope="module")
def browser():
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no chromedriver, or no Chromium, here")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        started = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
        one = Browser(next(match[1] for match in started if match), chromium)
        yield one
        one.ask("", "DELETE")
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def opened(browser, tmp_path):
    """A page in the browser -> browser, numbers of the first picture, its likeliest class and its plan."""
    model = SOTGLP(random_clip(), NAMES, n_support=5, epsilon=0.02).eval()
    text, data, images = page_of(model)
    browser.open(tmp_path / "page.html", text)
    picture = data["pictures"][0]
    label = picture["labels"][0]
    plan = visualize.look(model, images[:1], model.encode_prompts(), label).plan
    yield browser, picture, label, plan
    assert browser.errors() == []


def test_the_page_shows_the_runs_own_numbers_and_names_as_text(opened):
    browser, picture, label, plan = opened
    final = f"{picture['global'][label] + 0.25 * picture['local'][label]:.2f}"
    assert browser.shown("#decision td:nth-child(4)").startswith(final)
    assert browser.shown("#local td:last-child") == f"{picture['local'][label]:.2f}"
    assert browser.shown("#transport td:nth-child(6)") == f"{100 * plan[0, 0]:.2f}"
    names = browser.js("[...document.querySelectorAll('#local th.class')].map((part) => part.textContent)")
    assert names == [f"{NAMES[6]} (true)" if label == 6 else NAMES[label] for label in picture["labels"]]
    assert browser.js("window.harm === undefined")


def test_nothing_lies_outside_of_a_narrow_viewport(opened):
    browser, *_ = opened
    outside = "[...document.querySelectorAll('body *')].filter((part) => !part.closest('.scroll table')" \
        " && part.getBoundingClientRect().right > 360).map((part) => part.outerHTML.slice(0, 99))"
    assert browser.js("innerWidth") == 360 and browser.js(outside) == []
    assert browser.js("document.documentElement.scrollWidth") == 360


def test_each_slider_moves_its_equation(opened):
    browser, *_ = opened
    browser.press("[name=lambda]", HOME)
    assert browser.shown("#decision td:nth-child(4)") == browser.shown("#decision td:nth-child(2)")
    browser.press("[name=K]", END)
    assert browser.js("document.querySelectorAll('#transport tbody tr').length") == 16 + 1      # and the sums
    browser.press("[name=K]", HOME)
    assert "among these 6 classes" in browser.shown("#among")
    assert browser.shown("#transport td:nth-child(6)") == "25.00"               # 100 / 4 prompts
    browser.click("#reset")
    browser.press("[name=epsilon]", END)
    assert browser.shown("#facts").startswith("Entropy 1.000")
    browser.press("[name=epsilon]", HOME)
    browser.press("[name=iterations]", HOME)
    facts = browser.shown("#facts")
    assert " 0.00 % in rows" not in facts and " 0.00 % in columns" in facts


def test_kinds_of_plan_and_single_steps(opened):
    browser, *_ = opened
    browser.press("[name=iterations]", HOME)
    browser.click("label:has([value=converged])")
    assert " 0.00 % in rows, 0.00 % in columns" in browser.shown("#facts")
    browser.click("label:has([value=uniform])")
    assert browser.shown("#transport td:nth-child(7)") == "5.00"                # 100 / (5 * 4 prompts)
    browser.click("label:has([value=steps])")
    for exact, other in (("rows", "columns"), ("columns", "rows")):
        browser.click("#step")
        facts = browser.shown("#facts")
        assert f" 0.00 % in {exact}" in facts and f" 0.00 % in {other}" not in facts


def test_patch_prompt_class_and_picture_are_chosen_and_stand_in_the_address(opened):
    browser, picture, label, _ = opened
    browser.press("#map", RIGHT + RIGHT + DOWN)
    browser.click("#each button:nth-child(2)")
    assert browser.js("document.querySelectorAll('th.lit').length") == 2           # of cost and of plan
    browser.click("#classes label:nth-of-type(2)")
    assert browser.shown("#local tr.chosen th").startswith(NAMES[picture["labels"][1]])
    deadline = time.monotonic() + 10
    while "class=1" not in browser.js("location.hash") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert browser.js("location.hash") == "#class=1&patch=5&prompt=1"

    browser.js("light()")                                # what is chosen, wherever the mouse happens to rest
    assert browser.shown("#reading").startswith("Row 2, column 2: ")
    before = browser.js("document.body.innerText")
    browser.ask("/refresh")
    browser.js("light()")
    assert browser.js("document.body.innerText") == before

    browser.click("#pictures label:nth-of-type(2)")
    assert "<b>1" in browser.shown("#classes legend")
    browser.click("#reset")
    browser.click("#pictures label:nth-of-type(1)")
    assert browser.shown("#local td:last-child") == f"{picture['local'][label]:.2f}"


@pytest.mark.parametrize("method, parts", [
    ("gallop", ["Saliency", "Local logit", "Global logit", "Decision"]),
    ("plot", ["Saliency", "Transport", "Local logit", "Decision"]),
    ("coop", ["Saliency", "Global logit", "Decision"])])
def test_other_methods_show_the_parts_that_they_have(browser, tmp_path, method, parts):
    model = METHODS[method](random_clip(), NAMES).eval()
    text, data, images = page_of(model)
    browser.open(tmp_path / "page.html", text)
    shown = browser.js("[...document.querySelectorAll('h2')].filter((part) => part.checkVisibility())"
                       ".map((part) => part.firstChild.textContent.trim())")
    assert shown == parts and browser.errors() == []
    with torch.no_grad():
        decisive = model.logits(model(images[:1]))[0].max()
    assert browser.shown("#decision tbody tr:first-child td:last-child").startswith(f"{decisive:.2f}")


def test_a_page_on_another_drive_names_the_whole_address(monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")       # Windows' words

    monkeypatch.setattr(explore.os.path, "relpath", fail)
    assert explore.address_from(tmp_path) == explore.PAPER.as_uri()
