"""The router's fit against its own definition: the gradient of what it minimises, and every threshold tried."""

import torch

from stages.routing.router import LEAST, fit


def test_weights_are_at_the_least_of_the_penalised_loss_and_the_threshold_at_the_most_right():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=generator) * 1.5
    labels, tuning_labels = (torch.arange(count) % 4 for count in (200, 80))
    hidden, tuning = (
        centres[each] + torch.randn(len(each), 12, generator=generator) * 2 for each in (labels, tuning_labels)
    )
    hidden, tuning = (each * torch.logspace(-3, 3, 12) + 7 for each in (hidden, tuning))  # of any scale

    router = fit(hidden, labels, tuning, tuning_labels)

    scale = hidden.double().std(0)
    weight = (router.weight.double() * scale).requires_grad_()
    bias = (router.bias.double() + router.weight.double() @ hidden.double().mean(0)).requires_grad_()
    logits = (hidden.double() - hidden.double().mean(0)) / scale @ weight.T + bias
    none_is_last = torch.where(labels == 0, 3, labels - 1)
    loss = torch.nn.functional.cross_entropy(logits, none_is_last, reduction="sum") + weight.square().sum() / 2
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-2 * loss

    def right(threshold: float) -> int:
        likely = (tuning.double() @ router.weight.double().T + router.bias.double()).softmax(-1)
        best = likely[:, :-1].argmax(-1)
        chosen = torch.where(likely[:, :-1].amax(-1) >= threshold, best + 1, 0)
        return int((chosen == tuning_labels).sum())

    most = max(right(LEAST + step / 200) for step in range(100))
    assert right(router.threshold) == int((router.choose(tuning) == tuning_labels).sum()) == most > 40
