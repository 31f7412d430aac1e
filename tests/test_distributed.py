"""Two processes give the values, gradients and files of one. One pair of them shows it all: two_ranks.py."""

import http.server
import threading
from hashlib import sha256

import pytest
import torch

from conftest import TORCHRUN, random_clip, read, run, train
from methods import locoop
from sotglp import SOTGLP, objective
from two_ranks import (CACHED, CASES, NAMES, TRAINED, batch, few_pictures, gradients, make_method, make_model,
                       step_of_a_method, transport_of_three)

WEIGHTS = b"weights"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends WEIGHTS from every address that ends in there.pt, and counts the requests."""

    def do_GET(self):
        self.server.requests.append(self.path.rsplit("/", 1)[1])
        there = self.path.endswith("there.pt")
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(WEIGHTS) if there else 0))
        self.end_headers()
        self.wfile.write(WEIGHTS if there else b"")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pair(options, tmp_path_factory):
    """What each rank left, the folder of their run, the finished command, the requests that the server got."""
    folder = tmp_path_factory.mktemp("pair")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{sha256(WEIGHTS).hexdigest()}"
        process = run(*TORCHRUN, "tests/two_ranks.py", folder, f"{address}/there.pt", f"{address}/missing.pt", *options,
                      CLIP_CACHE=str(folder / "cache"), no_proxy="127.0.0.1")
        server.shutdown()
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder, process, server.requests


@pytest.mark.parametrize("case", CASES)
def test_shared_text_work_changes_neither_values_nor_gradients(case, pair):
    n_images, n_classes = CASES[case]
    model = make_model(n_classes)
    images, labels, kept = batch(n_images, n_classes)
    loss = objective(*model(images, kept), labels)
    loss.backward()
    ranks = [rank[case] for rank in pair[0]]
    assert sum(rank[1] for rank in ranks) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for found, _, texts in ranks:
        for text, expected in zip(texts, model.encode_prompts(), strict=True):
            torch.testing.assert_close(text, expected.detach(), atol=1e-5, rtol=1e-5)
        for name, expected in gradients(model).items():
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("n_images", [3, 1])
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_give_a_methods_loss_and_gradients(name, n_images, pair):
    # three images: two and one; one image: the second process has none
    expected, loss = step_of_a_method(name, n_images, 0, 1)
    for rank in pair[0]:
        found, total = rank[f"{name}, {n_images}"]
        assert total == pytest.approx(loss, rel=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-3)


def test_background_patches_are_uneven_over_the_processes():
    # else the test above could not tell LoCoOp's mean over the batch from a mean of means
    images, labels, _ = batch(3, 5)
    outputs = make_method("locoop")(images)
    counts = locoop.background(outputs[1], labels, 1).sum(dim=1).tolist()
    assert counts[0] + counts[2] != 2 * counts[1] and all(counts)


def test_the_plan_of_prompt_ot_is_that_of_the_whole_batch(pair):
    loss, by_image, by_text = transport_of_three(0, 1)
    (first, *zero), (second, *one) = (rank["transport"] for rank in pair[0])
    assert first + second == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close((zero[0], one[0]), (by_image[0::2], by_image[1::2]))
    torch.testing.assert_close(zero[1] + one[1], by_text)


def test_one_process_downloads_and_both_get_the_file_or_the_error(pair):
    ranks, folder, _, requests = pair
    assert requests == ["there.pt", "missing.pt"]
    for rank in ranks:
        assert rank["there"] == str(folder / "cache/there.pt")
        assert "cannot download" in rank["missing"] and "http://127.0.0.1:" in rank["missing"]
    assert [path.name for path in (folder / "cache").iterdir()] == ["there.pt"]


def test_a_process_without_test_pictures_counts_with_the_others(pair):
    expected = few_pictures(0, 1)
    assert sum(expected[1]) == 1 and [rank["few"] for rank in pair[0]] == [expected] * 2


def test_each_process_gets_the_rows_of_the_others(pair):
    for three, one in (rank["rows"] for rank in pair[0]):
        assert three.tolist() == [[0, 0], [1, 1], [2, 2]] and one.tolist() == [[0, 0]]


def test_two_processes_train_as_one_does(trained, pair):
    _, folder, process, _ = pair
    assert process.stdout.count("epoch   1") == 2                        # two runs, of which rank 0 alone prints
    assert "2 processes on cpu, 1 thread each" in process.stdout
    (one, log_one, last_one), (two, log_two, last_two) = read(trained), read(folder / "run")
    assert (two["world_size"], two["threads"], two["test_images"]) == (2, 1, 7)
    for field in ("accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy"):
        assert one[field] == two[field]
    for a, b in zip(log_one, log_two, strict=True):
        for field in ("loss", "global_loss", "local_loss"):
            assert a[field] == pytest.approx(b[field], rel=1e-4)
        assert a["train_accuracy"] == pytest.approx(b["train_accuracy"])
        for field in ("plan_entropy", "overlap", "prompt_cosine", "row_error"):
            assert a[field] == pytest.approx(b[field], rel=1e-4, abs=1e-5)
    for name, tensor in last_one["learned"].items():
        torch.testing.assert_close(last_two["learned"][name], tensor, atol=1e-4, rtol=1e-3)
    for i, state in last_one["optimizer"]["state"].items():               # SGD's momentum: the gradients, summed up
        torch.testing.assert_close(last_two["optimizer"]["state"][i]["momentum_buffer"], state["momentum_buffer"],
                                   atol=1e-4, rtol=1e-2)
    assert (folder / "run/per_class.csv").read_text() == (trained / "per_class.csv").read_text()


def test_two_processes_train_on_cached_features_as_one_does(options, pair, tmp_path):
    train(*options, *CACHED, "--output-dir", tmp_path)
    (entry,), (other,) = read(tmp_path)[1], read(pair[1] / "cached")[1]
    for field in ("loss", "global_loss", "local_loss", "train_accuracy", "plan_entropy", "overlap", "prompt_cosine"):
        assert entry[field] == pytest.approx(other[field], rel=1e-4)
    assert entry["row_error"] == pytest.approx(other["row_error"], rel=0.05) and entry["row_error"] > 1e-4


@pytest.mark.parametrize("options", [dict(text_chunk=1), dict(text_chunk=2), dict(text_chunk=2, checkpoint_text=True)])
def test_chunks_and_checkpoints_change_neither_values_nor_gradients(options):
    whole, parts = make_model(5), make_model(5, **options)
    images, labels, kept = batch(3, 5)
    for model in (whole, parts):
        objective(*model(images, kept), labels).backward()
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], expected, atol=1e-6, rtol=1e-3)


def test_names_of_any_length_meet_their_own_eot():
    # each class alone gives what it gives among longer and shorter ones
    together = make_model(5).encode_prompts()[0]
    for i, name in enumerate(NAMES):
        alone = SOTGLP(random_clip(), [name], n_support=5).encode_prompts()[0]
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)
