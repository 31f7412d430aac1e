"""The recipe of the authors' scripts, what it computes otherwise, and SOT-GLP with another local score."""

import math

import pytest
import torch
import torch.nn.functional as F

import clip
import ood
from harness import runs
import train as script
from conftest import copy, read, train
from clip.prompts import tokenize_names
from methods import METHODS, released
from methods.released import local_mean_logits
from sotglp import SOTGLP, fuse, local_logits, objective, unit

NAMES = ["annual_crop", "sea", "wood"]
# What the files train_script/scripts/run_*.sh of the authors' repository pass: lr, epochs, batch size, N_l.
SCRIPTS = {"imagenet": "0.01 50 256 4", "caltech101": "0.005 200 32 6", "oxford_flowers": "0.005 200 32 6",
           "oxford_pets": "0.005 200 32 6", "stanford_cars": "0.005 200 32 4", "food101": "0.005 200 128 6",
           "sun397": "0.005 200 128 4", "ucf101": "0.005 200 128 4", "dtd": "0.002 200 128 4",
           "fgvc_aircraft": "0.01 200 128 2", "eurosat": "0.001 200 10 4",
           "critters": "0.005 200 32 4", "folder": "0.005 200 32 4"}                # no script: Caltech's, N_l = 4


# ---- the options ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", SCRIPTS)
def test_the_recipe_is_that_of_the_datasets_script(dataset):
    args = vars(script.parse_args(["--recipe", "released", "--dataset", dataset]))
    lr, *counts = SCRIPTS[dataset].split()
    assert args["lr"] == float(lr)
    assert [args[name] for name in ("epochs", "batch_size", "n_local")] == [*map(int, counts)]
    paper = vars(script.parse_args(["--dataset", dataset]))
    assert {name: args[name] for name in args if args[name] != paper[name]
            and name not in ("lr", "epochs", "batch_size", "n_local", "output_dir")} == {
        "recipe": "released", "warmup_epochs": 0, "n_global": 3, "lambda_local": 1.0, "sampler": "proportional",
        "local_mean": True, "no_plan_gradient": True, "vv_alias": True, "keep_underscores": True}


@pytest.mark.parametrize("option, name, value", [
    (("--lr", "0.3"), "lr", 0.3), (("--n-global", "5"), "n_global", 5), (("--sampler", "exact"), "sampler", "exact"),
    (("--no-local-mean",), "local_mean", False), (("--plan-gradient",), "no_plan_gradient", False),
    (("--no-vv-alias",), "vv_alias", False), (("--no-keep-underscores",), "keep_underscores", False)])
def test_an_option_that_is_given_overrides_the_recipe(option, name, value):
    assert getattr(script.parse_args(["--recipe", "released", *option]), name) == value


def test_another_method_has_no_recipe_to_choose(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--method", "coop", "--recipe", "released"])
    assert "coop has no --recipe released" in capsys.readouterr().err


# ---- what is computed otherwise ------------------------------------------------------------------------------

def test_local_mean_logits_and_the_released_loss_by_hand():
    # One patch, so that the plan of two prompts is (1/2, 1/2): phi is the mean cosine, and divided by L = 2 its half.
    # Cosines of the patch (1, 0) with the classes' prompts: 0.6 and 1 -> 0.8 / 2 = 0.4; 0 and 0.8 -> 0.4 / 2 = 0.2.
    patches = torch.tensor([[[1.0, 0]]])
    text = torch.tensor([[[0.6, 0.8], [1, 0]], [[0, 1], [0.8, 0.6]]])
    scale = 5 * math.log(3)
    logits, plan = local_mean_logits(patches, text, scale, 1)
    torch.testing.assert_close(logits, scale * torch.tensor([[0.4, 0.2]]))
    torch.testing.assert_close(plan, torch.full((1, 2, 1, 2), 0.5))
    # The difference is ln 3, so the true class has 3/4: CE = ln(4/3). Global logits (0, 0): CE = ln 2. Both weigh 1.
    loss = objective(torch.zeros(1, 2), logits, torch.tensor([0]), lambda_local=released.ALL["lambda_local"])
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))


def test_both_recipes_fuse_alike_for_four_prompts():
    # the paper: global + local / 4; released: global + (local / L) for L = 4
    patches, text = unit(torch.randn(6, 12, 8)), unit(torch.randn(5, 4, 8))
    global_logits = torch.randn(6, 5)
    paper = fuse(global_logits, local_logits(patches, text, 100.0)[0])
    theirs = fuse(global_logits, local_mean_logits(patches, text, 100.0)[0], released.ALL["lambda_local"])
    torch.testing.assert_close(theirs, paper)
    assert torch.equal(theirs.argmax(dim=1), paper.argmax(dim=1))


def test_alias_adds_the_first_blocks_attention_once(clip_model):
    # before ln_post: the V-V stream + the first block's Q-K attention, here by torch's own function
    visual, images = clip_model.visual, torch.randn(2, 3, 32, 32)
    visual.ln_post = torch.nn.Identity()
    block = visual.transformer.resblocks[0]
    x = block.ln_1(visual.embed(images)).transpose(0, 1)                           # (1+P, B, W)
    attention, _ = F.multi_head_attention_forward(
        x, x, x, 128, 2, block.attn.in_proj_weight, block.attn.in_proj_bias, None, None, False, 0.0,
        block.attn.out_proj.weight, block.attn.out_proj.bias, training=False)
    (cls, patches), (cls_alias, patches_alias) = (visual(images, stream) for stream in ("vv", "vv_alias"))
    torch.testing.assert_close(patches_alias - patches, attention.transpose(0, 1)[:, 1:], atol=1e-4, rtol=0)
    assert torch.equal(cls_alias, cls)


@pytest.mark.parametrize("options, stream", [({}, "vv"), ({"vv_alias": True}, "vv_alias"),
                                             ({"vv_alias": True, "vv_attention": False}, "qk")])
def test_alias_is_a_stream_of_its_own(options, stream, clip_model):
    assert SOTGLP(clip_model, NAMES, **options).stream == stream


@pytest.mark.parametrize("keep, name", [(False, "annual crop"), (True, "annual_crop")])
def test_underscores_become_spaces_unless_they_are_kept(keep, name, clip_model):
    model = SOTGLP(clip_model, NAMES, keep_underscores=keep)
    assert torch.equal(model.text_encoder.prepare(4)[0], tokenize_names([name, "sea", "wood"], 4, 77)[0])
    assert model.class_names == NAMES
    assert clip.tokenize("annual_crop")[0].argmax() == clip.tokenize("annual crop")[0].argmax() + 1


def test_local_mean_divides_the_models_local_scores_by_the_number_of_prompts(clip_model):
    models = []
    for local_mean in (False, True):
        torch.manual_seed(1)
        models.append(SOTGLP(clip_model, NAMES, n_local=3, local_mean=local_mean))
    patches, text = unit(torch.randn(2, 16, 32)), unit(torch.randn(3, 3, 32))
    torch.testing.assert_close(models[1].local(patches, text), models[0].local(patches, text) / 3)


def test_independent_prompts_keep_their_own_patches_by_hand(clip_model):
    # One class. Cosines of three patches: with prompt one 0.8, 0.6, 0, with prompt two 0.6, 0, 1. K = 2:
    # (0.8 + 0.6) / 2 = 0.7 and (1 + 0.6) / 2 = 0.8, their mean 0.75
    model = METHODS["independent"](clip_model, ["sea"], n_support=2)
    patches = torch.tensor([[[0.8, 0.6, 0, 0], [0.6, 0, 0.8, 0], [0, 1, 0, 0]]])
    text = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    torch.testing.assert_close(model.local(patches, text), 0.75 * model.scale.view(1, 1))


# ---- runs ----------------------------------------------------------------------------------------------------

def test_a_released_run_says_so_and_is_scored_at_its_temperature(options, tmp_path, pictures, capsys):
    run = tmp_path / "run"
    train(*options, "--recipe", "released", "--epochs", 1, "--sampler", "exact", "--output-dir", run)
    assert read(run)[0]["recipe"] == "released"
    model = runs.open_run(run)[1]
    assert (model.stream, model.local_score, len(model.global_prompts)) == ("vv_alias", local_mean_logits, 3)
    for given, temperature in (((), "1000"), (("--temperature", "2"), "2")):
        ood.main(ood.parse_args([str(run), "--ood-root", f"own={pictures}/test/sea", "--device", "cpu", *given]))
        assert f"temperature {temperature}," in capsys.readouterr().out


def test_a_run_from_before_the_recipes_is_the_papers(trained, options, tmp_path, capsys):
    _, _, last = read(trained)
    config = {name: value for name, value in last["config"].items() if name not in
              ("method", "recipe", "local_mean", "vv_alias", "keep_underscores")}
    run = copy(trained, tmp_path / "old", config=config)
    assert runs.open_run(run)[0]["config"] == last["config"]
    train(*options, "--output-dir", run, "--resume")
    assert f"{run} is finished" in capsys.readouterr().out


def test_dense_transport_keeps_all_patches(clip_model):
    model = METHODS["dense"](clip_model, NAMES)
    assert model.n_support == 16
    patches, text = unit(torch.randn(2, 16, 32)), unit(torch.randn(3, 4, 32))
    torch.testing.assert_close(model.local(patches, text), local_logits(patches, text, model.scale, 16)[0])
