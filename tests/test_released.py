"""The recipe of the authors' scripts, what it computes otherwise, and SOT-GLP with another local score."""

import math

import pytest
import torch
import torch.nn.functional as F

import clip
import ood
from harness import runs
import train as script
from conftest import read, train
from clip.prompts import tokenize_names
from methods import METHODS, OPTIONS
from methods.released import local_mean_logits
from clip.precision import unit
from sinkhorn import sinkhorn
from sotglp import fuse, local_logits, objective

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
    args = vars(script.parse_args(["--method", "released", "--dataset", dataset]))
    lr, *counts = SCRIPTS[dataset].split()
    assert args["lr"] == float(lr)
    assert [args[name] for name in ("epochs", "batch_size", "n_local")] == [*map(int, counts)]
    paper = vars(script.parse_args(["--dataset", dataset]))
    assert {name: args[name] for name in args if args[name] != paper[name]
            and name not in ("lr", "epochs", "batch_size", "n_local", "output_dir")} == {
        "method": "released", "warmup_epochs": 0, "n_global": 3, "lambda_local": 1.0, "sampler": "proportional"}
    # what the paper's ablations switch off is no option here
    assert {*paper} - {*args} == {"local_projection", "vv_attention", "class_specific", "plan_gradient"}


@pytest.mark.parametrize("option, name, value", [
    (("--lr", "0.3"), "lr", 0.3), (("--n-global", "5"), "n_global", 5), (("--sampler", "exact"), "sampler", "exact"),
    (("--n-local", "3"), "n_local", 3), (("--lambda-local", "0.5"), "lambda_local", 0.5)])
def test_an_option_that_is_given_overrides_the_recipe(option, name, value):
    assert getattr(script.parse_args(["--method", "released", *option]), name) == value


# ---- what is computed otherwise ------------------------------------------------------------------------------

def test_local_mean_logits_and_the_released_loss_by_hand():
    # One patch, so that the plan of two prompts is (1/2, 1/2): phi is the mean cosine, and divided by L = 2 its half.
    # Cosines of the patch (1, 0) with the classes' prompts: 0.6 and 1 -> 0.8 / 2 = 0.4; 0 and 0.8 -> 0.4 / 2 = 0.2.
    patches = torch.tensor([[[1.0, 0]]])
    text = torch.tensor([[[0.6, 0.8], [1, 0]], [[0, 1], [0.8, 0.6]]])
    scale = 5 * math.log(3)
    logits = local_mean_logits(patches, text, scale, 1)
    torch.testing.assert_close(logits, scale * torch.tensor([[0.4, 0.2]]))
    # The difference is ln 3, so the true class has 3/4: CE = ln(4/3). Global logits (0, 0): CE = ln 2. Both weigh 1.
    loss = objective(torch.zeros(1, 2), logits, torch.tensor([0]), lambda_local=OPTIONS["released"]["lambda_local"])
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))


def test_both_recipes_fuse_alike_for_four_prompts():
    # the paper: global + local / 4; released: global + (local / L) for L = 4
    patches, text = unit(torch.randn(6, 12, 8)), unit(torch.randn(5, 4, 8))
    global_logits = torch.randn(6, 5)
    paper = fuse(global_logits, local_logits(patches, text, 100.0)[0])
    theirs = fuse(global_logits, local_mean_logits(patches, text, 100.0), OPTIONS["released"]["lambda_local"])
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
    (cls, patches), (cls_alias, patches_alias) = (visual(images, stream) for stream in ("vv", "released_vv"))
    torch.testing.assert_close(patches_alias - patches, attention.transpose(0, 1)[:, 1:], atol=1e-4, rtol=0)
    assert torch.equal(cls_alias, cls)


def released(clip_model, **options):
    torch.manual_seed(1)
    return METHODS["released"](clip_model, NAMES, **options)


def test_the_plan_is_constant(clip_model):
    # One patch is kept of P: its plan is even and does not change. Two are kept: only a constant plan gives the gradient
    # of sum (plan * similarity) at that plan.
    patches = unit(torch.randn(1, 16, 32))
    text = unit(torch.randn(3, 4, 32)).requires_grad_()
    model = released(clip_model, n_support=2)
    logits, plan = local_logits(patches, text, 1.0, 2)
    model.local(patches, text)[0, 0].backward()
    _, kept = (patches @ text[0].T).mean(dim=-1)[0].topk(2, sorted=False)
    order = (patches[0, kept] @ text[0].T).detach()                                # (2, 4)
    expected = sinkhorn(1 - order).T @ patches[0, kept] * model.scale / 4
    torch.testing.assert_close(text.grad[0], expected)


def test_the_first_blocks_attention_is_added(clip_model):
    model, images = released(clip_model), torch.randn(2, 3, 32, 32)
    assert torch.equal(model.features(images)[1], clip_model.encode_patches(images, "released_vv")[1])


@pytest.mark.parametrize("method, name", [("sotglp", "annual crop"), ("released", "annual_crop")])
def test_underscores_become_spaces_but_in_the_release(method, name, clip_model):
    model = METHODS[method](clip_model, NAMES)
    assert torch.equal(model.text_encoder.prepare(4)[0], tokenize_names([name, "sea", "wood"], 4, 77)[0])
    assert model.class_names == NAMES
    assert clip.tokenize("annual_crop")[0].argmax() == clip.tokenize("annual crop")[0].argmax() + 1


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
    train(*options, "--method", "released", "--epochs", 1, "--sampler", "exact", "--output-dir", run)
    assert read(run)[0]["method"] == "released"
    model = runs.load_run(run)
    assert (model.stream, len(model.global_prompts)) == ("released_vv", 3)
    for given, temperature in (((), "1000"), (("--temperature", "2"), "2")):
        ood.main(ood.parse_args([str(run), "--ood-root", f"own={pictures}/test/sea", "--device", "cpu", *given]))
        assert f"temperature {temperature}," in capsys.readouterr().out
