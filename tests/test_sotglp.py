"""Eq. 1 and 3-11 and Sec. 3.5 with numbers worked by hand, and what must hold for any numbers."""

import math

import pytest
import torch

import clip
from sinkhorn import sinkhorn
from sotglp import (SOTGLP, draw_prompts, fuse, global_logits, local_logits, objective, project, saliency,
                    sparse_support, tokenize_names, unit)

NAMES = ["cat", "dog", "annual_crop land"]


def random_units(*shape):
    return unit(torch.randn(*shape))


@pytest.fixture
def model(clip_model):
    return SOTGLP(clip_model, NAMES, n_support=5)


# ---- Eq. 1 ---------------------------------------------------------------------------------------------------

def test_text_is_sos_prompt_name_eot(model, monkeypatch):
    # "annual crop land" has 3 tokens, "cat" one: with [SOS], 4 prompt tokens and [EOT] they are 9 and 7 long,
    # so that all sequences have length 9 and their [EOT] stand at 6 ("cat", "dog") and 8.
    seen = {}

    def spy(embeddings, eot):
        seen.update(embeddings=embeddings, eot=eot)
        return embeddings.sum(1)
    monkeypatch.setattr(model.clip, "encode_embeddings", spy)
    model.encode_prompts()
    texts, table = seen["embeddings"].unflatten(0, (3, 8)), model.clip.token_embedding.weight
    assert texts.shape == (3, 8, 9, 128)
    assert seen["eot"].view(3, 8).tolist() == [[6] * 8, [6] * 8, [8] * 8]
    sos, annual, crop, land, eot = clip.tokenize("annual crop land")[0, :5].tolist()
    for prompt in range(8):
        learned = model.global_prompts[prompt] if prompt < 4 else model.local_prompts[2, prompt - 4]
        expected = torch.cat([table[[sos]], learned, table[[annual, crop, land, eot]]])
        assert torch.equal(texts[2, prompt], expected)


def test_prompt_of_real_words_equals_encode_text(model):
    # global prompts start as the words "a photo of a"; give the local ones the same words
    with torch.no_grad():
        model.local_prompts.copy_(model.global_prompts[0].expand_as(model.local_prompts))
        global_text, local_text = model.encode_prompts()
        expected = unit(model.clip.encode_text(clip.tokenize(["a photo of a " + n.replace("_", " ") for n in NAMES])))
    for text in (global_text, local_text):
        torch.testing.assert_close(text, expected[:, None].expand(-1, 4, -1), atol=1e-5, rtol=0)


def test_start_of_the_parameters(clip_model):
    model = SOTGLP(clip_model, NAMES)
    words = clip_model.token_embedding.weight[clip.tokenize("a photo of a")[0, 1:5]]
    assert torch.equal(model.global_prompts, words.expand(4, -1, -1))
    # released scale: sqrt(6 / ((C + L) M W)) = sqrt(6 / ((3 + 4) * 4 * 128)) = 0.04092
    assert model.local_prompts.shape == (3, 4, 4, 128)
    assert 0.99 * 0.04092 < model.local_prompts.abs().max() <= 0.04092 + 1e-5
    assert torch.equal(model.local_projection, torch.eye(128))
    shared = SOTGLP(clip_model, NAMES, class_specific=False).local_prompts
    # shared: C counts as 1, sqrt(6 / ((1 + 4) * 4 * 128)) = 0.04841
    assert shared.shape == (4, 4, 128) and 0.99 * 0.04841 < shared.abs().max() <= 0.04841 + 1e-5


def test_longest_class_name_fits_and_one_token_more_is_refused():
    # 1 [SOS] + 4 prompt tokens + 71 of the name + 1 [EOT] = 77
    tokens, eot = tokenize_names(["cat " * 71], 4, 77)
    assert eot.item() + 4 == 76 and tokens.shape == (1, 73)
    for count in (72, 75, 76, 200):
        with pytest.raises(ValueError, match="class name 'cat cat"):
            tokenize_names(["dog", "cat " * count], 4, 77)


def test_shared_local_prompts_serve_every_class(clip_model):
    model = SOTGLP(clip_model, ["cat", "cat", "dog"], class_specific=False)
    _, local_text = model.encode_prompts()
    torch.testing.assert_close(local_text[0], local_text[1])
    assert not torch.allclose(local_text[0], local_text[2])


# ---- Eq. 3-6 -------------------------------------------------------------------------------------------------

def test_projection_by_hand():
    # z = (1, 2), W_local = [[0, 1], [2, 0]]: z W_local = (4, 1); proj = [[1], [0]] + second column [[-1], [1]]:
    # (4, 1) [[1, -1], [0, 1]] = (4, -3), of length 5 -> (0.8, -0.6). Without W_local: (1, 2) proj = (1, 1) / sqrt 2.
    z, W_local, proj = torch.tensor([[1.0, 2]]), torch.tensor([[0.0, 1], [2, 0]]), torch.tensor([[1.0, -1], [0, 1]])
    torch.testing.assert_close(project(z, proj, W_local), torch.tensor([[0.8, -0.6]]))
    torch.testing.assert_close(project(z, proj), torch.tensor([[0.5**0.5, 0.5**0.5]]))


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


def test_each_image_has_its_own_kept_prompts():
    image, text, kept = random_units(3, 5), random_units(4, 2, 5), torch.tensor([[0], [1], [0]])
    together = global_logits(image, text, 1.0, kept)
    for b in range(3):
        torch.testing.assert_close(together[b], text[:, kept[b, 0]] @ image[b])


@pytest.mark.parametrize("n_global, dropout, kept", [(4, 0.75, 1), (4, 0.0, 4), (4, 0.5, 2), (3, 0.75, 1),
                                                     (8, 0.75, 2), (4, 1.0, 1)])
def test_dropout_keeps_distinct_prompts(n_global, dropout, kept):
    # max(1, G - int(dropout G)): 4 - 3, 4 - 0, 4 - 2, 3 - int(2.25) = 1, 8 - 6, max(1, 4 - 4)
    draws = draw_prompts(200, n_global, dropout)
    assert draws.shape == (200, kept)
    assert all(len(set(row)) == kept for row in draws.tolist())
    assert set(draws.flatten().tolist()) == set(range(n_global))


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


@pytest.mark.parametrize("n_support", [0, 4])
def test_support_that_cannot_be_kept_is_an_error_with_both_numbers(n_support):
    with pytest.raises(ValueError, match=f"keep {n_support} of 3 patches"):
        sparse_support(SIMILARITY, n_support)


def test_local_logits_by_hand():
    # Patches (1, 0), (0, 1), (-1, 0); prompts (1, 0), (0, 1): cosines [[1, 0], [0, 1], [-1, 0]].
    # Eq. 7: saliencies 1/2, 1/2, -1/2; Eq. 8, K = 2: the first two patches. Cost 1 - sim = [[0, 1], [1, 0]].
    # Eq. 9 at epsilon 1 / ln 3: plan [[3/8, 1/8], [1/8, 3/8]]. Eq. 10: phi = 3/8 + 3/8 = 3/4. Eq. 11, 1/tau = 8: 6.
    patches = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    text = torch.tensor([[[1.0, 0], [0, 1]]])
    logits, plan = local_logits(patches, text, 8.0, n_support=2, epsilon=1 / math.log(3))
    torch.testing.assert_close(logits, torch.tensor([[6.0]]))
    assert sorted(plan.flatten().tolist()) == pytest.approx([1 / 8, 1 / 8, 3 / 8, 3 / 8])


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


# ---- Sec. 3.5 ------------------------------------------------------------------------------------------------

def test_objective_by_hand():
    # Eq. 5-6: logits (ln 3, 0) give p = (3/4, 1/4); labels 0 and 1 of two such images: -(ln 3/4 + ln 1/4) / 2.
    # Local logits (0, 0): p = 1/2, cross-entropy ln 2. Sum with lambda = 1/4: 0.836988 + 0.173287 = 1.010275.
    g = torch.tensor([[math.log(3), 0.0]] * 2)
    loss = objective(g, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2 + math.log(2) / 4, abs=1e-6)
    assert objective(g, torch.zeros(2, 2), torch.tensor([0, 1]), 0.0).item() == pytest.approx(0.836988, abs=1e-6)


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


def test_only_prompts_and_projection_learn(model):
    g, l = model.train()(torch.randn(2, 3, 32, 32))
    objective(g, l, torch.tensor([0, 2])).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {"global_prompts", "local_prompts", "local_projection"} == set(model.learned_state())
    assert not any(p.requires_grad for p in model.clip.parameters()) and not model.clip.training


def test_without_local_projection_it_stays_the_identity(clip_model):
    model = SOTGLP(clip_model, NAMES, local_projection=False, n_support=5)
    assert not model.local_projection.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"global_prompts", "local_prompts"}


def test_without_vv_the_patches_are_ordinary_tokens(clip_model):
    images = torch.randn(1, 3, 32, 32)
    _, patches = SOTGLP(clip_model, NAMES, vv_attention=False).encode_images(images)
    _, tokens = clip_model.encode_patches(images, "qk")
    torch.testing.assert_close(patches, unit(tokens @ clip_model.visual.proj), atol=1e-5, rtol=1e-4)


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


def test_dropout_is_drawn_in_training_alone(model):
    with torch.no_grad():
        model.global_prompts.normal_()
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(model.eval()(images)[0], model(images)[0])
    assert not torch.equal(model.train()(images)[0], model(images)[0])
    kept = torch.arange(8)[:, None] % 4
    assert torch.equal(model(images, kept)[0], model(images, kept)[0])


def test_an_empty_batch_gives_empty_logits_with_gradients(model):
    g, l = model.train()(torch.zeros(0, 3, 32, 32))
    assert g.shape == l.shape == (0, 3)
    (0 * (g + l).sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_every_function_is_float32_under_autocast(model):
    image, patches, text = random_units(2, 6), random_units(2, 9, 6), random_units(3, 4, 6)
    g = global_logits(image, text, 100.0)
    l, _ = local_logits(patches, text, 100.0, 4)
    loss, labels = objective(g, l, torch.tensor([0, 1])), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(global_logits(image, text, 100.0), g)
        assert torch.equal(local_logits(patches, text, 100.0, 4)[0], l)
        assert torch.equal(objective(g, l, labels), loss)
        for out in (*model.encode_prompts(), *model.encode_images(torch.randn(1, 3, 32, 32)), fuse(g.bfloat16(), l)):
            assert out.dtype == torch.float32
        torch.testing.assert_close(model.encode_prompts()[1].norm(dim=-1), torch.ones(3, 4))


def test_local_score_uses_the_sinkhorn_of_its_cost(model):
    patches, text = random_units(1, 5, 6), random_units(1, 2, 6)
    similarity = patches[0] @ text[0].T
    logits, _ = local_logits(patches, text, 1.0, n_support=5, n_iters=3)
    torch.testing.assert_close(logits.item(), (sinkhorn(1 - similarity, n_iters=3) * similarity).sum().item())
