"""Eq. 1 and 3-11 and Sec. 3.5 with numbers worked by hand, and what must hold for any numbers."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import clip
from clip.model import CLIP
from conftest import random_clip
from sinkhorn import sinkhorn
from clip.precision import unit
from clip.prompts import ClassTexts, tokenize_names
from sotglp import (SOTGLP, draw_prompts, fuse, global_logits, local_logits, objective, project, saliency,
                    sparse_support, specialisation)

NAMES = ["cat", "dog", "annual_crop land"]


def random_units(*shape):
    return unit(torch.randn(*shape))


def differ(prompts):
    """Makes the prompts all different, as training does: they start as copies, or near each other."""
    with torch.no_grad():
        prompts.add_(0.3 * torch.randn(prompts.shape))


@pytest.fixture(scope="module")
def clip_model():
    """One for all tests of this file, which leave it as it is: to make it takes longer than most of them."""
    return random_clip()


@pytest.fixture
def model(clip_model):
    return SOTGLP(clip_model, NAMES, n_support=5)


@pytest.mark.parametrize("function, expected", [
    # Sec. 4: 4 global and 4 local prompts, K = 10. lambda, epsilon, iterations, dropout: PAPER.md, 3, 4 and 6.
    (SOTGLP, dict(n_global=4, n_local=4, n_support=10, epsilon=0.1, n_iters=20, prompt_dropout=0.75,
                  local_projection=True, vv_attention=True, class_specific=True, plan_gradient=True)),
    (ClassTexts, dict(text_chunk=200, checkpoint_text=False, ranks=(0, 1))),
    (local_logits, dict(n_support=10, epsilon=0.1, n_iters=20, plan_gradient=True)),
    (sinkhorn, dict(a=None, b=None, epsilon=0.1, n_iters=20)),
    (objective, dict(lambda_local=0.25)), (fuse, dict(lambda_local=0.25)),
    (project, dict(local_projection=None)), (draw_prompts, dict(generator=None))])
def test_defaults_are_the_papers(function, expected):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected


# ---- Eq. 1 ---------------------------------------------------------------------------------------------------

def features_of(clip_model, prompt, name):
    """Eq. 1 for one prompt (M, W) and one name, by itself -> (D,)."""
    sos, *rest = clip.tokenize(name)[0].tolist()
    table = clip_model.token_embedding.weight
    text = torch.cat([table[[sos]], prompt, table[rest[: rest.index(max(rest)) + 1]]])
    return F.normalize(clip_model.encode_embeddings(text[None], torch.tensor([len(text) - 1]))[0], dim=0)


@pytest.mark.parametrize("chunk", [1, 2, 200])
@pytest.mark.parametrize("names", [  # sorted by length: 1, 2, 0 and 2, 3, 1, 0 and 1, 3, 2, 0: none is its own inverse
    ["sea lake", "cat", "dog"], ["annual crop land", "sea lake", "cat", "dog"],
    ["a red dog", "cat", "sea lake", "dog"]])
def test_each_class_has_the_text_features_of_its_own_name_and_prompts(names, chunk, clip_model):
    model = SOTGLP(clip_model, names, n_global=2, n_local=3, text_chunk=chunk)
    differ(model.global_prompts)
    differ(model.local_prompts)
    with torch.no_grad():
        global_text, local_text = model.encode_prompts()
        assert global_text.shape == (len(names), 2, 32) and local_text.shape == (len(names), 3, 32)
        for c, name in enumerate(names):
            for text, prompts in ((global_text, model.global_prompts), (local_text, model.local_prompts[c])):
                expected = torch.stack([features_of(clip_model, prompt, name) for prompt in prompts])
                torch.testing.assert_close(text[c], expected, atol=1e-5, rtol=0)


def test_text_is_sos_prompt_name_eot(model, monkeypatch):
    # "annual crop land" has 3 tokens, "cat" one: with [SOS], 4 prompt tokens and [EOT] they are 9 and 7 long,
    # so that all sequences have length 9 and their [EOT] stand at 6 ("cat", "dog") and 8.
    seen = {}

    def spy(embeddings, eot):
        seen.update(embeddings=embeddings, eot=eot)
        return embeddings.sum(1)
    monkeypatch.setattr(model.clip, "encode_embeddings", spy)
    model.encode_prompts()
    texts, table = seen["embeddings"].unflatten(0, (3, 4)), model.clip.token_embedding.weight
    assert texts.shape == (3, 4, 9, 128)
    assert seen["eot"].view(3, 4).tolist() == [[6] * 4, [6] * 4, [8] * 4]
    sos, annual, crop, land, eot = clip.tokenize("annual crop land")[0, :5].tolist()
    for prompt in range(4):                              # local ones; the global ones go through encode_with_prefix
        expected = torch.cat([table[[sos]], model.local_prompts[2, prompt], table[[annual, crop, land, eot]]])
        assert torch.equal(texts[2, prompt], expected)


def test_prompt_of_real_words_equals_encode_text(model):
    # global prompts start as the words "a photo of a"; give the local ones the same words
    with torch.no_grad():
        model.local_prompts.copy_(model.global_prompts[0].expand_as(model.local_prompts))
        global_text, local_text = model.encode_prompts()
        expected = unit(model.clip.encode_text(clip.tokenize(["a photo of a " + n.replace("_", " ") for n in NAMES])))
    for text in (global_text, local_text):
        torch.testing.assert_close(text, expected[:, None].expand(-1, 4, -1), atol=1e-5, rtol=0)


# released scale: sqrt(6 / ((C + L) M W)), M = 4, W = 128. C = 3, L = 4: sqrt(6 / 3584) = 0.04092; L = 2: 0.04841;
# shared by the classes C counts as 1: sqrt(6 / (5 * 512)) = 0.04841
@pytest.mark.parametrize("options, shape, bound", [
    (dict(), (3, 4, 4, 128), 0.04092), (dict(n_local=2), (3, 2, 4, 128), 0.04841),
    (dict(class_specific=False), (4, 4, 128), 0.04841)])
def test_local_prompts_start_uniform_and_all_different(options, shape, bound, clip_model):
    local = SOTGLP(clip_model, NAMES, **options).local_prompts.detach()
    assert local.shape == shape
    assert -bound - 1e-5 <= local.min() < -0.99 * bound and 0.99 * bound < local.max() <= bound + 1e-5
    assert abs(local.mean()) < 0.05 * bound                                        # as many below 0 as above
    assert local.std() == pytest.approx(bound / 3**0.5, rel=0.05)                  # of a uniform distribution
    assert len(local.unique()) > 0.99 * local.numel()                              # no prompt repeats another one


def test_local_prompts_follow_the_seed(clip_model):
    def start(seed):
        torch.manual_seed(seed)
        return SOTGLP(clip_model, NAMES).local_prompts
    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


@pytest.mark.parametrize("n_global", [1, 4])
def test_global_prompts_start_as_the_words_and_the_projection_as_the_identity(n_global, clip_model):
    model = SOTGLP(clip_model, NAMES, n_global=n_global)
    words = clip_model.token_embedding.weight[clip.tokenize("a photo of a")[0, 1:5]]
    assert torch.equal(model.global_prompts, words.expand(n_global, -1, -1))
    assert torch.equal(model.local_projection, torch.eye(128))


def test_longest_class_name_fits_and_one_token_more_is_refused():
    # 1 [SOS] + 4 prompt tokens + 71 of the name + 1 [EOT] = 77
    tokens, eot = tokenize_names(["cat " * 71], 4, 77)
    assert eot.item() + 4 == 76 and tokens.shape == (1, 73)
    assert tokenize_names(["cat " * 90], 4, 100)[1].item() == 91                   # a longer context takes longer ones
    for count in (72, 75, 76, 200):
        with pytest.raises(ValueError, match="class name 'cat cat"):
            tokenize_names(["dog", "cat " * count], 4, 77)


def test_class_names_must_fit_the_context_of_the_model_at_hand():
    # a context of 20 tokens: 1 [SOS] + 4 prompt tokens + 14 of the name + 1 [EOT]
    small = CLIP(32, 32, 8, 64, 1, 20, 49408, 64, 1)
    SOTGLP(small, ["dog", "cat " * 14])
    with pytest.raises(ValueError, match="'cat cat.* must fit into 20 tokens"):
        SOTGLP(small, ["dog", "cat " * 15])


def test_shared_local_prompts_serve_every_class(clip_model):
    model = SOTGLP(clip_model, ["cat", "cat", "dog"], class_specific=False)
    _, local_text = model.encode_prompts()
    torch.testing.assert_close(local_text[0], local_text[1])
    assert not torch.allclose(local_text[0], local_text[2])


def count_texts(clip_model, monkeypatch):
    """A list that gets the number of texts of every pass through the text tower from now on."""
    passes, own, behind = [], clip_model.encode_embeddings, clip_model.encode_with_prefix

    def counted(embeddings, eot):
        passes.append(len(embeddings))
        return own(embeddings, eot)

    def counted_behind(prefix, texts, eot):
        passes.append(len(texts) * len(prefix))
        return behind(prefix, texts, eot)
    monkeypatch.setattr(clip_model, "encode_embeddings", counted)
    monkeypatch.setattr(clip_model, "encode_with_prefix", counted_behind)
    return passes


@pytest.mark.parametrize("chunk, passes", [(1, [4] * 10), (2, [8, 8, 4] * 2), (4, [16, 4] * 2), (200, [20] * 2)])
def test_text_chunk_is_how_many_classes_go_through_the_text_tower_at_once(chunk, passes, clip_model, monkeypatch):
    # 5 classes with 4 global prompts each, then with 4 local ones
    seen = count_texts(clip_model, monkeypatch)
    SOTGLP(clip_model, ["cat", "dog", "sea", "red", "man"], text_chunk=chunk).encode_prompts()
    assert seen == passes


def test_checkpointed_text_is_computed_again_in_the_backward_pass(clip_model, monkeypatch):
    passes, gradients = count_texts(clip_model, monkeypatch), []
    for checkpoint_text, backward in ((False, []), (True, [8, 4, 8, 4])):
        torch.manual_seed(0)
        model = SOTGLP(clip_model, NAMES, text_chunk=2, checkpoint_text=checkpoint_text)
        global_text, local_text = model.encode_prompts()
        assert passes == [8, 4, 8, 4]                                              # twice 4 prompts, 2 + 1 classes
        (global_text[..., 0].sum() + local_text[..., 1].sum()).backward()
        assert sorted(passes[4:]) == sorted(backward)
        gradients.append((model.global_prompts.grad, model.local_prompts.grad))
        passes.clear()
    for plain, again in zip(*gradients):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(again, plain)


# ---- Eq. 3-6 -------------------------------------------------------------------------------------------------

def test_unit_divides_each_vector_by_its_length():
    # lengths 5 and 2, 10 and 13
    features = torch.tensor([[[3.0, 4], [0, 2]], [[6, -8], [-5, 12]]])
    torch.testing.assert_close(unit(features), torch.tensor([[[0.6, 0.8], [0, 1]], [[0.6, -0.8], [-5 / 13, 12 / 13]]]))
    assert unit(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_projection_by_hand():
    # z = (1, 2), W_local = [[0, 1], [2, 0]]: z W_local = (4, 1); proj = [[1], [0]] + second column [[-1], [1]]:
    # (4, 1) [[1, -1], [0, 1]] = (4, -3), of length 5 -> (0.8, -0.6). Without W_local: (1, 2) proj = (1, 1) / sqrt 2.
    z, W_local, proj = torch.tensor([[1.0, 2]]), torch.tensor([[0.0, 1], [2, 0]]), torch.tensor([[1.0, -1], [0, 1]])
    torch.testing.assert_close(project(z, proj, W_local), torch.tensor([[0.8, -0.6]]))
    torch.testing.assert_close(project(z, proj), torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_projection_of_patches_by_hand():
    # Two images of three patches each, W_local and proj as above; a patch is scaled by its own length alone:
    # (1, 2) -> (4, -3) / 5. (0, 1) -> (2, 0) -> (2, -2) / sqrt 8. (3, 0) -> (0, 3) -> (0, 3) / 3.
    z = torch.tensor([[[1.0, 2], [0, 1], [3, 0]], [[3, 0], [1, 2], [0, 1]]])
    W_local, proj = torch.tensor([[0.0, 1], [2, 0]]), torch.tensor([[1.0, -1], [0, 1]])
    a, b, c = [0.8, -0.6], [0.5**0.5, -(0.5**0.5)], [0.0, 1.0]
    torch.testing.assert_close(project(z, proj, W_local), torch.tensor([[a, b, c], [c, a, b]]))


def test_patches_go_through_the_local_projection_and_the_image_does_not(model):
    images = torch.randn(2, 3, 32, 32)
    cls, tokens = model.clip.encode_patches(images)
    with torch.no_grad():
        model.local_projection.normal_()
        image, patches = model.encode_images(images)
    torch.testing.assert_close(image, unit(model.clip.encode_image(images)))
    expected = unit(tokens @ model.local_projection.detach() @ model.clip.visual.proj)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-4)


def test_global_logits_by_hand():
    # image (0.6, 0.8); class 0 has prompts (1, 0) and (0, 1): cosines 0.6 and 0.8, mean 0.7; class 1 has (0.6, 0.8)
    # and (-0.6, -0.8): 1 and -1, mean 0. 1/tau = 10.
    image = torch.tensor([[0.6, 0.8]])
    text = torch.tensor([[[1.0, 0], [0, 1]], [[0.6, 0.8], [-0.6, -0.8]]])
    torch.testing.assert_close(global_logits(image, text, 10.0), torch.tensor([[7.0, 0.0]]))
    # dropout left this image prompt 1 alone: 0.8 and -1
    torch.testing.assert_close(global_logits(image, text, 10.0, torch.tensor([[1]])), torch.tensor([[8.0, -10.0]]))


def test_kept_prompts_are_averaged_by_hand():
    # cosines of image (1, 0) with three prompts: 0.6, -0.8, 1. Kept are 0 and 2: (0.6 + 1) / 2 = 0.8, times 10.
    image, text = torch.tensor([[1.0, 0]]), torch.tensor([[[0.6, 0.8], [-0.8, 0.6], [1, 0]]])
    torch.testing.assert_close(global_logits(image, text, 10.0, torch.tensor([[2, 0]])), torch.tensor([[8.0]]))


def test_each_image_has_its_own_kept_prompts():
    image, text, kept = random_units(3, 5), random_units(4, 2, 5), torch.tensor([[0], [1], [0]])
    together = global_logits(image, text, 1.0, kept)
    for b in range(3):
        torch.testing.assert_close(together[b], text[:, kept[b, 0]] @ image[b])


@pytest.mark.parametrize("n_global, dropout, kept", [(4, 0.75, 1), (4, 0.0, 4), (4, 0.5, 2), (3, 0.75, 1),
                                                     (8, 0.75, 2), (4, 1.0, 1), (4, 0.4, 3), (1, 0.75, 1)])
def test_dropout_keeps_distinct_prompts(n_global, dropout, kept):
    # max(1, G - int(dropout G)): 4 - 3, 4 - 0, 4 - 2, 3 - int(2.25) = 1, 8 - 6, max(1, 4 - 4), 4 - int(1.6), 1 - 0
    draws = draw_prompts(200, n_global, dropout)
    assert draws.shape == (200, kept) and draws.dtype == torch.int64
    assert all(len(set(row)) == kept for row in draws.tolist())
    assert set(draws.flatten().tolist()) == set(range(n_global))


def test_every_set_of_kept_prompts_is_equally_likely():
    # 6 pairs of 4 prompts, 6000 draws: 1000 each, with a standard deviation of sqrt(6000 * 1/6 * 5/6) = 29
    pairs = [tuple(sorted(row)) for row in draw_prompts(6000, 4, 0.5).tolist()]
    for pair in itertools.combinations(range(4), 2):
        assert pairs.count(pair) == pytest.approx(1000, abs=5 * 29)


def test_draw_follows_its_generator_alone():
    def draw(seed):
        return draw_prompts(50, 4, 0.5, torch.Generator().manual_seed(seed))
    first = draw(1)
    state = torch.get_rng_state()
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)
    assert torch.equal(torch.get_rng_state(), state)


# ---- Eq. 7-11 ------------------------------------------------------------------------------------------------

# One image, one class, three patches (rows), two prompts (columns).
SIMILARITY = torch.tensor([[[[0.9, 0.1], [0.5, 0.7], [0.0, 0.2]]]])


def test_saliency_by_hand():
    # (0.9 + 0.1) / 2, (0.5 + 0.7) / 2, (0.0 + 0.2) / 2
    torch.testing.assert_close(saliency(SIMILARITY), torch.tensor([[[0.5, 0.6, 0.1]]]))


def test_sparse_support_by_hand():
    # saliencies 0.5, 0.6, 0.1: the two best patches are 1 and 0, though prompt 0 alone would rank 0 first
    kept, patches = sparse_support(SIMILARITY, 2)
    assert set(patches.flatten().tolist()) == {0, 1}
    for row, patch in zip(kept[0, 0], patches[0, 0]):
        assert torch.equal(row, SIMILARITY[0, 0, patch])
    assert sparse_support(SIMILARITY, 1)[1].item() == 1


def test_support_is_shared_by_the_prompts_of_a_class_and_differs_between_classes():
    similarity = torch.stack([SIMILARITY[0, 0], SIMILARITY[0, 0].flip(0)])[None]     # class 1: patches in reverse
    _, patches = sparse_support(similarity, 1)
    assert patches.shape == (1, 2, 1) and patches.flatten().tolist() == [1, 1]
    _, patches = sparse_support(similarity, 2)
    assert set(patches[0, 0].tolist()) == {0, 1} and set(patches[0, 1].tolist()) == {1, 2}


@pytest.mark.parametrize("n_support", [0, 4, -1])
def test_support_that_cannot_be_kept_is_an_error_with_both_numbers(n_support):
    with pytest.raises(ValueError, match=f"keep {n_support} of 3 patches.* between 1 and 3"):
        sparse_support(SIMILARITY, n_support)


def test_all_patches_may_be_kept():
    kept, patches = sparse_support(SIMILARITY, 3)
    assert torch.equal(kept[0, 0], SIMILARITY[0, 0, patches[0, 0]]) and set(patches.flatten().tolist()) == {0, 1, 2}


def test_local_logits_by_hand():
    # Patches (1, 0), (0, 1), (-1, 0); prompts (1, 0), (0, 1): cosines [[1, 0], [0, 1], [-1, 0]].
    # Eq. 7: saliencies 1/2, 1/2, -1/2; Eq. 8, K = 2: the first two patches. Cost 1 - sim = [[0, 1], [1, 0]].
    # Eq. 9 at epsilon 1 / ln 3: plan [[3/8, 1/8], [1/8, 3/8]]. Eq. 10: phi = 3/8 + 3/8 = 3/4. Eq. 11, 1/tau = 8: 6.
    patches = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    text = torch.tensor([[[1.0, 0], [0, 1]]])
    logits, plan = local_logits(patches, text, 8.0, n_support=2, epsilon=1 / math.log(3))
    torch.testing.assert_close(logits, torch.tensor([[6.0]]))
    assert sorted(plan.flatten().tolist()) == pytest.approx([1 / 8, 1 / 8, 3 / 8, 3 / 8])


def test_local_logits_of_each_image_and_class_are_those_of_the_pair_alone():
    # Eq. 7-11 written out for one image and one class, with the most salient patches taken by a sort
    patches, text = random_units(2, 9, 6), random_units(3, 4, 6)
    logits, plans = local_logits(patches, text, 5.0, n_support=5, epsilon=0.2, n_iters=3)
    assert logits.shape == (2, 3) and plans.shape == (2, 3, 5, 4)
    for b in range(2):
        for c in range(3):
            similarity = patches[b] @ text[c].T                                      # (P, L)
            kept = similarity[similarity.mean(dim=1).sort(descending=True).indices[:5]]
            plan = sinkhorn(1 - kept, epsilon=0.2, n_iters=3)
            torch.testing.assert_close(logits[b, c], 5 * (plan * kept).sum())
            torch.testing.assert_close(plans[b, c].sort(dim=0).values, plan.sort(dim=0).values)


def test_one_patch_and_one_prompt_is_their_cosine():
    patches, text = random_units(3, 1, 6), random_units(4, 1, 6)
    logits, plan = local_logits(patches, text, 1.0, n_support=1)
    torch.testing.assert_close(logits, patches[:, 0] @ text[:, 0].T)
    torch.testing.assert_close(plan, torch.ones(3, 4, 1, 1))


def test_huge_epsilon_averages_the_kept_cosines():
    patches, text = random_units(2, 9, 6), random_units(3, 4, 6)
    logits, _ = local_logits(patches, text, 1.0, n_support=9, epsilon=1e5)
    torch.testing.assert_close(logits, (patches.mean(1) @ text.mean(1).T), atol=1e-5, rtol=0)


def test_transport_prefers_what_matches():
    # the plan minimises cost, so its similarity is at least that of spreading evenly over the same patches
    patches, text = random_units(5, 12, 6), random_units(3, 4, 6)
    sharp, _ = local_logits(patches, text, 1.0, n_support=6, epsilon=0.02, n_iters=200)
    even, _ = local_logits(patches, text, 1.0, n_support=6, epsilon=1e5)
    assert (sharp > even).all()


def test_order_of_patches_and_prompts_does_not_matter():
    patches, text = random_units(2, 9, 6), random_units(3, 4, 6)
    shuffled = local_logits(patches[:, torch.randperm(9)], text[:, torch.randperm(4)], 5.0, n_support=4)[0]
    torch.testing.assert_close(local_logits(patches, text, 5.0, n_support=4)[0], shuffled, atol=1e-5, rtol=1e-5)


def test_plan_gradient_decides_whether_the_plan_is_a_constant():
    patches, text = random_units(2, 9, 6), random_units(3, 4, 6).requires_grad_()
    through = torch.autograd.grad(local_logits(patches, text, 1.0, 4)[0].sum(), text)[0]
    logits, plan = local_logits(patches, text, 1.0, 4, plan_gradient=False)
    constant = torch.autograd.grad(logits.sum(), text)[0]
    # held constant, d phi_c / d text_cl = sum over images and kept patches of plan * patch
    _, kept = sparse_support(torch.einsum("bpd,cld->bcpl", patches, text.detach()), 4)
    chosen = patches[torch.arange(2)[:, None, None], kept]                           # (B, C, K, D)
    torch.testing.assert_close(constant, torch.einsum("bckl,bckd->cld", plan, chosen))
    assert not torch.allclose(through, constant, rtol=1e-2)


def test_gradient_of_local_logits_equals_finite_differences():
    patches, text = random_units(1, 6, 3).double(), random_units(2, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: local_logits(patches, t, 2.0, 4, 0.3, 5)[0], text)


# ---- Sec. 3.5 ------------------------------------------------------------------------------------------------

def test_objective_by_hand():
    # Eq. 5-6: logits (ln 3, 0) give p = (3/4, 1/4); labels 0 and 1 of two such images: -(ln 3/4 + ln 1/4) / 2.
    # Local logits (0, 0): p = 1/2, cross-entropy ln 2. Sum with lambda = 1/4: 0.836988 + 0.173287 = 1.010275.
    g = torch.tensor([[math.log(3), 0.0]] * 2)
    loss = objective(g, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2 + math.log(2) / 4, abs=1e-6)
    assert objective(g, torch.zeros(2, 2), torch.tensor([0, 1]), 0.0).item() == pytest.approx(0.836988, abs=1e-6)


def test_local_objective_has_the_same_labels_by_hand():
    # Global logits (0, 0): ln 2. Local (ln 3, 0) with label 1: -ln 1/4 = ln 4. lambda = 2: ln 2 + 2 ln 4 = 5 ln 2.
    local = torch.tensor([[math.log(3), 0.0]])
    assert objective(torch.zeros(1, 2), local, torch.tensor([1]), 2.0).item() == pytest.approx(5 * math.log(2))


def test_fusion_by_hand():
    # 2 + 0.25 * 4 = 3, 3 + 0.25 * (-4) = 2: the local branch turns the decision
    g, l = torch.tensor([[2.0, 3.0]]), torch.tensor([[4.0, -4.0]])
    assert fuse(g, l).tolist() == [[3.0, 2.0]] and fuse(g, l, 0.0).tolist() == [[2.0, 3.0]]


# ---- the whole model -----------------------------------------------------------------------------------------

def test_forward_is_the_sum_of_its_parts(model):
    images = torch.randn(2, 3, 32, 32)
    g, l = model.eval()(images)
    image, patches = model.encode_images(images)
    global_text, local_text = model.encode_prompts()
    torch.testing.assert_close(g, global_logits(image, global_text, math.exp(2)))
    torch.testing.assert_close(l, local_logits(patches, local_text, math.exp(2), 5)[0])


@pytest.mark.parametrize("options", [dict(), dict(n_support=3), dict(n_support=16), dict(epsilon=0.02),
                                     dict(n_iters=1), dict(plan_gradient=False)], ids=str)
def test_options_reach_the_local_score_and_its_gradient(options, clip_model):
    options = {"n_support": 5, "epsilon": 0.03, **options}        # why 0.03: there one iteration is not yet enough
    model = SOTGLP(clip_model, NAMES, **options)
    differ(model.local_prompts)
    images = torch.randn(2, 3, 32, 32)

    def with_gradient(local):
        return local.detach(), *torch.autograd.grad(local[:, 1].sum(), (model.local_prompts, model.local_projection))

    def by_functions(**options):
        patches, text = model.encode_images(images)[1], model.encode_prompts()[1]
        return with_gradient(local_logits(patches, text, model.scale, **options)[0])

    found = with_gradient(model(images)[1])
    for a, b in zip(found, by_functions(**options)):
        torch.testing.assert_close(a, b)
    # and an option that is set to something else changes something
    changed = {"n_support": 7, "epsilon": 0.3, "n_iters": 7, "plan_gradient": not options.get("plan_gradient", True)}
    for name, value in changed.items():
        others = by_functions(**{**options, name: value})
        assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, others)), name


def test_temperature_is_clips_own():
    clip_model, images = random_clip(), torch.randn(2, 3, 32, 32)
    model = SOTGLP(clip_model, NAMES, n_support=5).eval()
    before = model(images)
    clip_model.logit_scale.data = torch.tensor(3.0).half()                         # float32 all the same
    assert model.scale.item() == pytest.approx(math.exp(3), rel=1e-6)
    for a, b in zip(model(images), before):
        torch.testing.assert_close(a, math.e * b)                                  # e^3 / e^2


def test_only_prompts_and_projection_learn(model):
    g, l = model.train()(torch.randn(2, 3, 32, 32))
    objective(g, l, torch.tensor([0, 2])).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {"global_prompts", "local_prompts", "local_projection"} == set(model.learned_state())
    assert not any(p.requires_grad for p in model.clip.parameters()) and not model.clip.training


def test_learned_state_is_all_that_a_model_adds_to_its_clip(model):
    learned = model.learned_state()
    assert {name for name in model.state_dict() if not name.startswith("clip.")} == set(learned)
    assert not any(tensor.requires_grad for tensor in learned.values())
    learned["local_prompts"].zero_()                                               # the model's own memory
    assert not model.local_prompts.any()


def test_what_a_model_adds_is_on_the_device_of_its_clip():
    with torch.device("meta"):                                   # a device that every machine has; it holds no numbers
        clip_model = CLIP(32, 32, 8, 64, 1, 77, 49408, 64, 1)
    model = SOTGLP(clip_model, NAMES)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_class_names_stay_as_they_were_given(clip_model):
    assert SOTGLP(clip_model, tuple(NAMES)).class_names == NAMES                   # a list, with its underscores


def test_without_local_projection_it_stays_the_identity(clip_model):
    model = SOTGLP(clip_model, NAMES, local_projection=False, n_support=5)
    assert not model.local_projection.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"global_prompts", "local_prompts"}


@pytest.mark.parametrize("vv_attention, stream", [(True, "vv"), (False, "qk")])
def test_without_vv_the_patches_are_ordinary_tokens(vv_attention, stream, clip_model):
    images = torch.randn(1, 3, 32, 32)
    model = SOTGLP(clip_model, NAMES, vv_attention=vv_attention).eval()
    _, patches = model.encode_images(images)
    _, tokens = clip_model.encode_patches(images, stream)
    torch.testing.assert_close(patches, unit(tokens @ clip_model.visual.proj), atol=1e-5, rtol=1e-4)
    local = local_logits(patches, model.encode_prompts()[1], model.scale)[0]
    torch.testing.assert_close(model(images)[1], local)


def test_more_patches_than_there_are_cannot_be_asked_for(clip_model):
    SOTGLP(clip_model, NAMES, n_support=16)                                        # 32 / 8 = 4 by 4 patches
    with pytest.raises(ValueError, match="keep 17 of 16 patches"):
        SOTGLP(clip_model, NAMES, n_support=17)


def test_features_at_hand_serve_in_place_of_images(model):
    images, kept = torch.randn(3, 3, 32, 32), torch.tensor([[0], [2], [1]])
    features = model.clip.encode_patches(images)
    for a, b in zip(model(images, kept), model(features, kept)):
        assert torch.equal(a, b)


def test_score_of_an_image_ignores_its_batch(model):
    images = torch.randn(5, 3, 32, 32)
    g, l = model.eval()(images)
    for b in range(5):
        g1, l1 = model(images[b : b + 1])
        torch.testing.assert_close(torch.cat([g1, l1]), torch.stack([g[b], l[b]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout, kept", [(0.75, 1), (0.5, 2), (0.0, 4)])
def test_in_training_each_image_keeps_some_of_the_prompts(dropout, kept, clip_model):
    # each row of global logits is the mean over one set of `kept` of the 4 prompts, and not always the same set
    model = SOTGLP(clip_model, NAMES, prompt_dropout=dropout).train()
    differ(model.global_prompts)
    images = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    sets = torch.tensor(list(itertools.combinations(range(4), kept)))
    with torch.no_grad():
        image, text = model.encode_images(images[:1])[0], model.encode_prompts()[0]
        possible = global_logits(image.expand(len(sets), -1), text, model.scale, sets)             # (sets, C)
        distance = (model(images)[0][:, None] - possible).abs().amax(dim=-1)                       # (B, sets)
    assert distance.amin(dim=1).max() < 1e-4
    assert len(distance.argmin(dim=1).unique()) > min(1, len(sets) - 1)


def test_dropout_is_drawn_in_training_alone(model):
    differ(model.global_prompts)
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(model.eval()(images)[0], model(images)[0])
    assert not torch.equal(model.train()(images)[0], model(images)[0])


@pytest.mark.parametrize("training", [True, False])
def test_prompts_kept_by_the_caller_are_those_that_count(training, model):
    differ(model.global_prompts)
    images, kept = torch.randn(4, 3, 32, 32), torch.tensor([[3, 1], [0, 1], [2, 3], [0, 2]])
    image, text = model.encode_images(images)[0], model.encode_prompts()[0]
    found, local = model.train(training)(images, kept)
    torch.testing.assert_close(found, global_logits(image, text, math.exp(2), kept))
    assert not torch.allclose(found, global_logits(image, text, math.exp(2)), rtol=1e-3)
    torch.testing.assert_close(local, model.eval()(images)[1])                     # no dropout of local prompts


def test_an_empty_batch_gives_empty_logits_with_gradients(model):
    g, l = model.train()(torch.zeros(0, 3, 32, 32))
    assert g.shape == l.shape == (0, 3)
    (0 * (g + l).sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- precision -----------------------------------------------------------------------------------------------

# the functions that compute in float32 whatever comes, and something for each of them
PRECISE = {
    global_logits: lambda: (random_units(2, 6), random_units(3, 4, 6), 100.0),
    saliency: lambda: (torch.randn(2, 3, 9, 4),),
    sparse_support: lambda: (torch.randn(2, 3, 9, 4), 5),
    local_logits: lambda: (random_units(2, 9, 6), random_units(3, 4, 6), 100.0, 4),
    objective: lambda: (5 * torch.randn(2, 3), 5 * torch.randn(2, 3), torch.tensor([0, 2])),
    fuse: lambda: (5 * torch.randn(2, 3), 5 * torch.randn(2, 3), 0.3),
    specialisation: lambda: (random_units(2, 9, 6), random_units(3, 4, 6), torch.tensor([2, 0]), 4),
    unit: lambda: (torch.randn(2, 6),),
    project: lambda: (torch.randn(2, 5, 8), torch.randn(8, 6), torch.randn(8, 8)),
    sinkhorn: lambda: (torch.rand(3, 2), torch.tensor([1 / 8, 3 / 8, 1 / 2]), torch.tensor([1 / 4, 3 / 4]))}


@pytest.mark.parametrize("function", PRECISE, ids=lambda function: function.__name__)
def test_every_function_is_float32_under_autocast_and_of_half_inputs(function):
    names = [*inspect.signature(function).parameters]

    def outputs(first, *others):
        by_place, by_name = function(first, *others), function(first, **dict(zip(names[1:], others)))
        by_place, by_name = ([*found.values()] if isinstance(found, dict) else
                             found if isinstance(found, tuple) else (found,) for found in (by_place, by_name))
        assert all(map(torch.equal, by_place, by_name))
        return by_place

    def cast(values, dtype):
        return [v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for v in values]

    values = PRECISE[function]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = outputs(*cast(cast(values, dtype), torch.float32))            # of the same numbers, in float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = outputs(*cast(values, dtype))
        for found in (outputs(*cast(values, dtype)), under_autocast):
            for a, b in zip(found, expected, strict=True):
                assert a.dtype in (torch.float32, torch.int64) and torch.equal(a, b)
    double = outputs(*cast(values, torch.float64))
    assert double[0].dtype == torch.float64


def test_features_and_scores_of_the_model_are_float32_under_autocast(model):
    images = torch.randn(1, 3, 32, 32)
    texts, features = model.encode_prompts(), model.encode_images(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, expected in zip((*model.encode_prompts(), *model.encode_images(images)), (*texts, *features)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))
            assert F.cosine_similarity(found, expected, dim=-1).min() > 0.99     # the towers do run in bfloat16
        assert all(logits.dtype == torch.float32 for logits in model(images))


# ---- what the scripts ask of a method ------------------------------------------------------------------------

OUTPUTS = torch.tensor([[math.log(3), 0.0]] * 3), torch.tensor([[0.0, math.log(7)]] * 3)
LABELS = torch.tensor([0, 1, 1])


def test_parts_of_the_loss_add_up_to_the_objective_by_hand(model):
    # global: -ln 3/4, -ln 1/4, -ln 1/4 over 3 images; local: -ln 1/8, -ln 7/8, -ln 7/8; lambda 1/2
    model.lambda_local = 0.5
    global_loss = (math.log(4 / 3) + 2 * math.log(4)) / 3
    local_loss = (math.log(8) + 2 * math.log(8 / 7)) / 3
    loss, terms = model.loss(OUTPUTS, LABELS, 3)
    assert loss.item() == pytest.approx(global_loss + local_loss / 2)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"global": global_loss, "local": local_loss})
    torch.testing.assert_close(loss, objective(*OUTPUTS, LABELS, 0.5))
    shares = [model.loss([logits[part] for logits in OUTPUTS], LABELS[part], 3)[0]
              for part in (slice(0, 1), slice(1, 3), slice(0, 0))]        # uneven, and one without an image
    assert shares[2] == 0 and sum(shares).item() == pytest.approx(loss.item())


def test_scores_by_hand(model):
    # fused: ln 3 + 0 against 0 + ln 7 / 2: 1.0986 against 0.9730
    model.lambda_local = 0.5
    scores = model.scores(OUTPUTS)
    assert list(scores) == ["fused", "global", "local"]
    assert scores["fused"][0].tolist() == pytest.approx([math.log(3), math.log(7) / 2])
    assert scores["global"] is OUTPUTS[0] and scores["local"] is OUTPUTS[1]


def test_cosines_are_averaged_over_the_prompts(model):
    differ(model.global_prompts)
    images, texts = torch.randn(2, 3, 32, 32), model.encode_prompts()
    image, patches = model.encode_images(images)
    cosines, patch_cosines = model.cosines(images, texts)
    torch.testing.assert_close(cosines, torch.einsum("bd,cgd->bcg", image, texts[0]).mean(-1))
    torch.testing.assert_close(patch_cosines, torch.einsum("bpd,cld->bpcl", patches, texts[1]).mean(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model.cosines(model.clip.encode_patches(images), texts)
    assert all(part.dtype == torch.float32 for part in again)


def test_texts_at_hand_serve_in_place_of_prompts(model):
    images = torch.randn(2, 3, 32, 32)
    first, second = model.eval()(images), model(images, text_features=[-text for text in model.encode_prompts()])
    torch.testing.assert_close(second[0], -first[0])
    assert not torch.allclose(second[1], first[1])


def test_draws_are_those_of_the_generator(model):
    drawn = [model.draw(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0].shape == (5, 1) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], draw_prompts(5, 4, 0.75, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("suffix", ["", "."])
def test_any_prompts_are_encoded_with_every_name_and_a_suffix(suffix, model):
    table = model.clip.token_embedding.weight
    words = table[clip.tokenize("two words")[0, 1:3]].detach()            # (M, W), M = 2
    for prompts in (words.expand(3, -1, -1), words.expand(len(NAMES), 3, -1, -1)):
        features = model.encode(prompts, suffix)
        texts = [f"two words {name.replace('_', ' ')}{suffix}" for name in NAMES]
        expected = unit(model.clip.encode_text(clip.tokenize(texts)))
        torch.testing.assert_close(features, expected[:, None].expand(-1, 3, -1), atol=1e-5, rtol=0)


# ---- Figure 2, in numbers ------------------------------------------------------------------------------------

def test_specialisation_by_hand():
    # Five patches and the two prompts of class 1, (1, 0) and (0.6, 0.8), whose cosine is 0.6. Their similarities:
    #   1  (0.96, -0.28)    0.96   0.352
    #   2  (0.8, 0.6)       0.8    0.96
    #   3  (0.6, 0.8)       0.6    1
    #   4  (0, 1)           0      0.8
    #   5  (-1, 0)         -1     -0.6
    # The three best of the first prompt are 1, 2, 3, those of the second 3, 2, 4: two of three in common.
    # K = 2 keeps 2 and 3, of mean 0.88 and 0.8. One iteration with epsilon 1: rows to 1/2, then columns to 1/2.
    # Class 0 has two equal prompts: its rows are exact, so that the largest row error is that of class 1.
    text = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    patches = torch.tensor([[[0.96, -0.28], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    kernel = torch.tensor([[0.8, 0.96], [0.6, 1.0]], dtype=torch.float64).exp()    # the factor exp(-1) cancels
    rows = kernel / kernel.sum(1, keepdim=True) / 2
    plan = rows / rows.sum(0) / 2
    entropy = -sum(p * math.log(p) for p in plan.flatten().tolist())
    row_error = max(abs(2 * sum(row) - 1) for row in plan.tolist())
    one, zero = (specialisation(patches, text, torch.tensor([label]), n_support=2, epsilon=1.0, n_iters=1)
                 for label in (1, 0))
    assert {name: value.tolist() for name, value in one.items()} == {
        name: pytest.approx([value]) for name, value in {"plan_entropy": entropy / math.log(4), "row_error": row_error,
                                                         "overlap": 2 / 3, "prompt_cosine": 0.6}.items()}
    assert row_error > 1e-4 and entropy < 0.999 * math.log(4)
    assert {name: value.tolist() for name, value in zero.items()} == {
        name: pytest.approx([value]) for name, value in {"plan_entropy": 1, "row_error": row_error, "overlap": 1,
                                                         "prompt_cosine": 1}.items()}


@pytest.mark.parametrize("P, L, n_support", [(7, 1, 1), (2, 3, 2), (1, 1, 1)])
def test_specialisation_is_a_number_where_there_is_little_to_share(P, L, n_support):
    found = specialisation(random_units(2, P, 8), random_units(3, L, 8), torch.tensor([2, 0]), n_support)
    assert all(-1 <= x <= 1 + 1e-5 for value in found.values() for x in value.tolist())
    assert L > 1 or found["overlap"].tolist() == found["prompt_cosine"].tolist() == [0, 0]


def test_diagnostics_are_those_of_the_models_features_and_options(model):
    differ(model.local_prompts)
    model.epsilon, model.n_iters = 0.02, 2
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    patches, text = model.encode_images(images)[1], model.encode_prompts()[1]
    found = model.diagnostics(images, labels)
    for name, expected in specialisation(patches, text, labels, 5, 0.02, 2).items():
        torch.testing.assert_close(found[name], expected.detach())
        assert not found[name].requires_grad and len({*found[name].tolist()}) > 1
    assert all(len(value) == 0 for value in model.diagnostics(images[:0], labels[:0]).values())


@pytest.mark.parametrize("class_specific", [True, False])
def test_one_pass_for_both_kinds_of_prompts_changes_neither_values_nor_gradients(class_specific, clip_model):
    # a GPU takes it where there are few classes; names of one and of three tokens
    found = []
    for saves_launches in (False, True):
        torch.manual_seed(0)
        model = SOTGLP(clip_model, ["cat", "annual crop land"], n_global=2, n_local=3, class_specific=class_specific)
        assert not model.text_encoder.saves_launches
        model.text_encoder.saves_launches = saves_launches
        texts = model.encode_prompts()
        assert [tuple(text.shape) for text in texts] == [(2, 2, 32), (2, 3, 32)]
        sum(text.pow(3).sum() for text in texts).backward()
        found.append([*texts, model.global_prompts.grad, model.local_prompts.grad])
    for two, one in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
