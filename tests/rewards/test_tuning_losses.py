"""The three objectives against sums worked out by hand, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from prism.rewards import losses


def test_flow_dpo_is_its_closed_form():
    winner, loser = torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.4])
    known_winner, known_loser = torch.tensor([0.2, 0.5]), torch.tensor([0.2, 0.4])
    loss, margin = losses.flow_dpo(winner, loser, known_winner, known_loser, beta=2.0)
    assert margin.tolist() == pytest.approx([0.2, 0.0])  # -(2 / 2) ((0.1 - 0.2) - (0.3 - 0.2))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.2)), math.log(2)])


def test_a_step_of_flow_dpo_brings_the_winner_nearer_and_the_loser_farther():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # of the winner and of the loser
    output = torch.zeros(2, 2, requires_grad=True)
    error, known = losses.errors(output, target), losses.errors(torch.zeros(2, 2), target)
    loss, _ = losses.flow_dpo(error[:1], error[1:], known[:1], known[1:], beta=4.0)
    loss.sum().backward()
    # d loss / d e_w = beta / 2 * sigmoid(0) = 1, and d e_w / d output = (output - target) for means over two numbers.
    assert output.grad.tolist() == [[-1.0, 0.0], [0.0, 1.0]]


def test_errors_are_means_where_latents_are_denoised():
    output, target = torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.zeros(2, 2)
    assert losses.errors(output, target).tolist() == [13.0, 4.0]
    assert losses.errors(output, target, torch.tensor([[True, False], [True, True]])).tolist() == [1.0, 4.0]


def test_probabilities_are_clipped_standard_scores_about_a_half():
    r = losses.probabilities(torch.tensor([1.0, 2.0, 3.0, 14.0]), spread=2.0, clip=2.5)
    assert r.tolist() == pytest.approx([0.5 - 4 / 10, 0.5 - 3 / 10, 0.5 - 2 / 10, 1.0])


def test_diffusion_nft_is_its_form_worked_out_number_by_number():
    output, old = torch.tensor([[0.4, -1.0]]), torch.tensor([[0.2, 0.6]])
    noisy, clean, sigma, r, beta, clip = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.7, 1.1]]), 0.5, 0.8, 0.25, 5.0

    def clean_of(velocity):
        return noisy - sigma * velocity

    total = 0.0
    for weight, sign in ((r, 1), (1 - r, -1)):
        differences = []
        for index in range(2):
            v = old[0, index] + sign * beta * (output[0, index] - old[0, index])
            differences.append(float(noisy[0, index] - sigma * v - clean[0, index]))
        squares = sum(d**2 for d in differences) / 2
        total += weight * squares / (sum(abs(d) for d in differences) / 2)
    loss = losses.diffusion_nft(output, old, clean_of, clean, torch.tensor([r]), beta, clip)
    assert loss.item() == pytest.approx(clip / beta * total, rel=1e-6)


def test_diffusion_nft_follows_good_samples_and_leaves_bad_ones():
    old, clean = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    for r, sign in ((0.9, -1), (0.1, 1)):
        output = torch.zeros(1, 2, requires_grad=True)
        losses.diffusion_nft(output, old, lambda v: v, clean, torch.tensor([r]), 0.5, 5.0).sum().backward()
        assert math.copysign(1, output.grad[0, 0]) == sign
        assert output.grad[0, 1] == 0
