"""Any model seen at its blocks: states by hooks are states by hand, and the model is left as it was."""

import pytest
import torch
import torchvision
from geodesic import networks, watch
from torch import nn
from torch.nn import functional as F


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


class Layer(nn.Module):
    """A transformer-like layer: a tuple in, a tuple out, a mask by name, norm before or after."""

    def __init__(self, width=8, post=False):
        super().__init__()
        self.mix, self.feed, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.post = post

    def forward(self, hidden, mask=None):
        """The next tokens and the mean that mixed them."""
        x = hidden if self.post else self.norm(hidden)
        mean = (x if mask is None else x * mask[..., None]).mean(1, keepdim=True)
        moved = hidden + self.mix(mean) + self.feed(x).relu()
        return (self.norm(moved) if self.post else moved), mean


class Transformer(nn.Module):
    """Tokens in a mapping, a mapping out."""

    def __init__(self, depth=3, post=False, width=8):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Layer(width, post) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, ids, mask=None):
        """Logits and the last hidden state."""
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)[0]
        return {"logits": self.head(hidden.mean(1)), "hidden": hidden}


def vgg():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(a, 6, 3, padding=1), nn.ReLU(inplace=True)) for a in (3, 6, 6, 6)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(6 * 64, 5))


def chain(*blocks):
    return nn.Sequential(*blocks)


def test_states_of_a_resnet_are_those_by_hand(resnet, generator):
    """layer2.0 and its like open a stage; what leads into layer1.0 is the first state of the first."""
    x = torch.randn(3, 3, 64, 64, generator=generator)
    watched = watch.watch(resnet)
    stages, output = watched.read(x)
    with torch.no_grad():
        net = resnet.eval()
        state = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        hand = [[state]]
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in layer:
                after = block(state)
                hand[-1].append(after) if after.shape == state.shape else hand.append([after])
                state = after
        want = net.fc(net.avgpool(state).flatten(1))
    assert [stage.blocks for stage in watched.stages] == [
        ("layer1.0", "layer1.1"), ("layer2.1",), ("layer3.1",), ("layer4.1",)
    ]  # fmt: skip
    assert [len(stage) for stage in stages] == [3, 2, 2, 2]
    for got, states in zip(stages, hand, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, states, strict=True))
    assert torch.equal(output, want)
    assert watched.notes == []


@pytest.mark.parametrize("kind", networks.NETWORKS)
@pytest.mark.parametrize(("dataset", "stages"), [("digits", 1), ("cifar10", 4)])
def test_our_networks_are_read_the_same_with_hooks_and_without(kind, dataset, stages, generator):
    net = networks.build(kind, dataset, stages, norm="batch", width=4, generator=generator).eval()
    x = torch.randn(3, *net.arch.in_shape, generator=generator)
    watched = watch.watch(net, "stages.*.blocks.*")
    (own, logits), (seen, output) = net.read(x), watched.read(x)
    assert [stage.shape for stage in watched.stages] == list(net.arch.stage_shapes)
    for a, b in zip(own, seen, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    assert torch.equal(logits, output)
    assert torch.equal(logits, net(x))
    carries = watched.identity_maps(x)
    assert set(carries.values()) == {"resnet": {True}, "plain": {False}, "radial": set()}[kind]


@pytest.mark.parametrize("post", [False, True])
def test_tokens_in_tuples_and_mappings(post, generator):
    torch.manual_seed(0)
    model = Transformer(post=post).eval()
    batch = {"ids": torch.randint(0, 20, (4, 6), generator=generator), "mask": torch.ones(4, 6)}
    with torch.no_grad():
        hidden = [model.embed(batch["ids"])]
        for layer in model.layers:
            hidden.append(layer(hidden[-1], mask=batch["mask"])[0])
    views = {
        None: lambda h: h, "mean": lambda h: h.mean(1), "first": lambda h: h[:, 0], "last": lambda h: h[:, -1],
        "all": lambda h: h.reshape(24, 8), watch.VIEWS["first"]: lambda h: h[:, 0],
    }  # fmt: skip
    for view, want in views.items():
        watched = watch.watch(model, "layers.*", view)
        (states,), output = watched.read(batch)
        assert all(torch.equal(a, want(b)) for a, b in zip(states, hidden, strict=True))
        assert output.keys() == {"logits", "hidden"}
    assert watched.identity_maps(batch) == dict.fromkeys(("layers.0", "layers.1", "layers.2"), True)


def test_blocks_are_maps_of_their_states(resnet, generator):
    """The chain of a stage's blocks takes x_0 to x_L; with other tensors besides, or under a view, it is no map."""
    watched = watch.watch(resnet)
    stages, _ = watched.read(torch.randn(2, 3, 64, 64, generator=generator))
    state = stages[0][0]
    with watch.undisturbed(resnet):
        for block in watched.maps(0):
            state = block(state)
    torch.testing.assert_close(state, stages[0][-1])
    ids = torch.randint(0, 20, (4, 6), generator=generator)
    watched = watch.watch(Transformer(), "layers.*")
    (states,), _ = watched.read(ids)
    with watch.undisturbed(watched.model):
        torch.testing.assert_close(watched.maps(0)[0](states[0]), states[1])
    watched.read({"ids": ids, "mask": torch.ones(4, 6)})
    with pytest.raises(ValueError, match=r"layers\.0 takes more than the state"):
        watched.maps(0)
    watched = watch.watch(Transformer(), "layers.*", "mean")
    watched.read(ids)
    with pytest.raises(ValueError, match="no map"):
        watched.maps(0)


def test_states_changed_in_place_are_kept_and_named(generator):
    """The rectifier that follows a layer writes over its output; the state is what the layer gave."""
    model = chain(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    x = torch.randn(2, 3, 4, 4, generator=generator)
    watched = watch.watch(model, "?")
    (states,), _ = watched.read(x)
    with torch.no_grad():
        assert torch.equal(states[1], model[0](x))
        assert torch.equal(states[2], F.relu(model[0](x)))
    assert watched.notes == ["outputs changed in place, of which the state before is kept: 0 by 1"]
    watched = watch.watch(model, ["0", "2"])
    stages, _ = watched.read(x)
    assert [len(stage) for stage in stages] == [2, 2]
    assert watched.notes == [
        "something that is not watched stands between these, and a new stage opens: 0 and 2",
        "outputs changed in place, of which the state before is kept: 0 before 2 reads it",
    ]


def test_a_plain_stack_has_no_identity_maps(generator):
    model = vgg()
    watched = watch.watch(model, "0.*")
    stages, _ = watched.read(torch.randn(3, 3, 8, 8, generator=generator))
    assert [len(stage) for stage in stages] == [4]
    assert watched.identity_maps(torch.randn(3, 3, 8, 8, generator=generator)) == dict.fromkeys(watched.blocks, False)


class Noisy(nn.Module):
    """Draws a number, and fails on demand."""

    fail = False

    def forward(self, x):
        """The input and some noise."""
        if self.fail:
            raise RuntimeError("broken")
        return x + torch.rand_like(x)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail, generator):
    """Hooks, every module's mode, gradients, buffers and the random state, also where the model fails."""
    model = chain(nn.Linear(4, 4), nn.BatchNorm1d(4), Noisy())
    model[0].eval()
    model(torch.randn(5, 4, generator=generator)).sum().backward()
    model[2].fail = fail
    gradient, buffers = model[0].weight.grad.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    watched = watch.watch(model, "?")
    x = torch.randn(5, 4, generator=generator, requires_grad=True)
    if fail:
        with pytest.raises(RuntimeError, match="broken"):
            watched.read(x)
    else:
        (states,), _ = watched.read(x)
        assert not any(s.requires_grad for s in states)
        watched.identity_maps(x)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, gradient)
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_wrappers_are_taken_off(resnet):
    assert watch.watch(nn.DataParallel(resnet)).model is resnet
    assert watch.watch(torch.compile(resnet)).model is resnet


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_model_is_refused(resnet):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not function"):
        watch._unwrapped(lambda x: x)  # past the check of types that tests have
    with pytest.raises(TypeError, match="scripted"):
        watch.watch(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "0")
    model = chain(nn.Linear(2, 2))
    model.compile()
    with pytest.raises(TypeError, match="compiled in place"):
        watch.watch(model, "0")
    with pytest.raises(ValueError, match=r"'layr\?\.\*'; the nearest names are: layer4\.1, "):
        watch.watch(resnet, "layr?.*")
    with pytest.raises(ValueError, match=r"layer1\.0 lies in block layer1"):
        watch.watch(resnet, ["layer1", "layer1.0"])
    with pytest.raises(ValueError, match="view='token' is unknown; pass 'mean'"):
        watch.watch(resnet, view="token")


def twice():
    block = nn.Linear(3, 3)
    return chain(chain(block), nn.ReLU(), chain(block))


class Skipping(nn.Module):
    """Never runs its second block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        """Of the first block alone."""
        return self.blocks[0](x)


class Turned(nn.Module):
    """Points on another axis."""

    def forward(self, x):
        """The transpose."""
        return x.T.contiguous()


def broken():
    model = chain(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "blocks", "said"),
    [
        (twice(), "0.0", r"block 0\.0 runs more than once"),
        (Skipping(), "blocks.*", r"blocks\.1 did not run"),
        (chain(nn.Linear(3, 3), Turned()), "?", "block 1 is torch.float32 of shape .3, 5. for 5 points"),
        (chain(nn.Linear(3, 4), nn.Linear(4, 5)), "?", "none of the 2 blocks .0, 1. keeps the shape"),
        (broken(), "?", "non-finite states, block 1 being the first"),
    ],
)
def test_what_has_no_track_is_said_in_a_line(model, blocks, said, generator):
    with pytest.raises(ValueError, match=said) as error:
        watch.watch(model, blocks).read(torch.randn(5, 3, generator=generator))
    assert "\n" not in str(error.value)


def test_states_keep_their_shape_from_batch_to_batch(generator):
    watched = watch.watch(Transformer(), "layers.*")
    watched.read(torch.randint(0, 20, (4, 6), generator=generator))
    with pytest.raises(ValueError, match=r"layers\.0 have shape \(7, 8\) in this batch and \(6, 8\) before"):
        watched.read(torch.randint(0, 20, (4, 7), generator=generator))
    watched = watch.watch(Transformer(), "layers.*", "all")
    for length in (6, 7):
        (states,), _ = watched.read(torch.randint(0, 20, (4, length), generator=generator))
        assert states[0].shape == (4 * length, 8)
    with pytest.raises(ValueError, match="view='mean' is one of tokens"):
        watch.watch(chain(nn.Linear(3, 3)), "0", "mean").read(torch.randn(5, 3, generator=generator))
    with pytest.raises(TypeError, match="a batch of int holds no tensor"):
        watched.read(3)


def test_other_precisions(generator):
    """A batch is brought to the model's device and precision; whole numbers stay."""
    model = Transformer().double()
    batch = watch.placed({"ids": torch.zeros(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3)}, model)
    assert (batch["ids"].dtype, batch["mask"].dtype) == (torch.int64, torch.float64)
    (states,), _ = watch.watch(model, "layers.*").read(batch)
    assert states[0].dtype == torch.float64
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    (states,), _ = watch.watch(model, "?").read(watch.placed(torch.randn(3, 4, generator=generator), model))
    assert states[0].dtype == torch.bfloat16
