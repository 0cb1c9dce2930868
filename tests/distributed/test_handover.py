"""Separated prefill and decoding over real process groups, against one process."""

from __future__ import annotations

import re
import signal
import socket
from types import SimpleNamespace

import pytest
import torch

from tests.cli.conversion import run
from tests.distributed import separated
from tests.distributed.forked import run_ranks
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from undivided.convert.tpla import convert_tpla
from undivided.distributed import Roles
from undivided.distributed.ragged import RaggedBatch
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

NUM_LAYERS = 3
PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
REQUESTS = [
    {"prompts": PROMPTS, "max_new_tokens": 8},
    {"prompts": [[9, 9, 9]], "max_new_tokens": 12},
    {"prompts": PROMPTS[:2], "max_new_tokens": 6, "temperature": 2.0, "seed": 3},
    {"prompts": PROMPTS[1:], "max_new_tokens": 1},
]
NUM_TOKENS = sum(len(prompt) for request in REQUESTS for prompt in request["prompts"])
# Layout -> the checkpoints it is tried with; the numbers of prefill and decode ranks.
LAYOUTS = {
    (2, 2): ["none", "hadamard", "pca", "exact norm", "windows", "mla", "ends"],
    (1, 1): ["pca", "mla"],
    (1, 2): ["pca"],
    (2, 1): ["pca"],
    (2, 4): ["pca", "exact norm"],
}


def converted(transform: str, **modes: str) -> UndividedForCausalLM:
    source = tiny_model("deepseek_v3", dtype=torch.float64, num_hidden_layers=NUM_LAYERS)
    calibration = torch.randint(1, 256, (4, 24), generator=torch.Generator().manual_seed(1))
    return convert_tpla(source, transform=transform, calibration=calibration, prefill="exact", **modes)[0]


def with_windows() -> UndividedForCausalLM:
    """TPLA of a Gemma-2, whose layers alternate between windows of 8 keys and all keys."""
    sizes = dict(latent_dim=16, rope_dim=8, nope_dim=8, value_dim=8, latent_norm=False, rope_stride=2)
    entry = {"mechanism": "tpla", "prefill": "exact", **sizes}
    base = tiny_config("gemma2", num_hidden_layers=NUM_LAYERS)
    torch.manual_seed(3)
    model = UndividedForCausalLM(UndividedConfig(base_config=base, attention=[entry] * NUM_LAYERS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def with_an_end(model: UndividedForCausalLM) -> UndividedForCausalLM:
    """Makes the third token of the first prompt's continuation an end token."""
    token = expected(model, REQUESTS[0])[0][2]
    model.config.base_config.eos_token_id = model.config.eos_token_id = token
    model.generation_config.eos_token_id = token
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """Checkpoints in a folder, and the same models in this process."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: converted(name) for name in ("none", "hadamard", "pca")}
    made |= {"exact norm": converted("pca", norm="exact"), "windows": with_windows()}
    source = tiny_model("deepseek_v3", dtype=torch.float64, num_hidden_layers=NUM_LAYERS)
    made["mla"] = UndividedForCausalLM(
        UndividedConfig(base_config=source.config, attention=[{"mechanism": "mla"}] * NUM_LAYERS)
    )
    made["mla"].native.load_state_dict(source.state_dict())
    made["mla"].double().eval()
    made["ends"] = with_an_end(converted("pca"))
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return SimpleNamespace(folder=folder, made=made)


def expected(model: UndividedForCausalLM, request: dict) -> list[list[int]]:
    """The continuations that one process generates, up to and with the end token."""
    prompts, temperature = request["prompts"], request.get("temperature", 0.0)
    batch = RaggedBatch([len(prompt) for prompt in prompts])
    ids = batch.unpack(torch.tensor([token for prompt in prompts for token in prompt])[:, None]).flatten(1)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": None} if temperature else {}
    torch.manual_seed(request.get("seed", 0))
    new = model.generate(
        ids,
        attention_mask=batch.mask,
        max_new_tokens=request["max_new_tokens"],
        pad_token_id=0,
        **({"do_sample": False} | sampling),
    )[:, ids.shape[1] :]
    end = model.generation_config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in new.tolist()]


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """Returns what the ranks of a layout answered; every layout is started once."""
    folder, known = tmp_path_factory.mktemp("answers"), {}

    def answer(layout):
        if layout not in known:
            target, place = separated.answer, folder / f"{layout[0]}+{layout[1]}"
            known[layout] = run_ranks(
                target, sum(layout), place, LAYOUTS[layout], models.folder, layout[0], REQUESTS
            )
        return known[layout]

    return answer


@pytest.mark.parametrize(("layout", "name"), [(k, name) for k, names in LAYOUTS.items() for name in names])
def test_the_ranks_go_on_as_one_process_does(layout, name, models, answers):
    wanted = [expected(models.made[name], request) for request in REQUESTS]
    reports = [report[name] for report in answers(layout)]
    for report in reports[: layout[0]]:
        assert report["tokens"] == [[row[0] for row in rows] for rows in wanted]
    for report in reports[layout[0] :]:
        assert report["tokens"] == wanted


def test_sequences_end_where_one_process_ends_them(models):
    rows = expected(models.made["ends"], REQUESTS[0])
    assert len(rows[0]) <= 3 and max(len(row) for row in rows) == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decode_rank_gets_its_columns_of_every_token_and_nothing_else(layout, models, answers):
    num_prefill, num_decode = layout
    headers = sum(4 + len(request["prompts"]) for request in REQUESTS) * 8
    firsts = sum(len(request["prompts"]) for request in REQUESTS) * 8
    meetings = 4 * 8 * (sum(layout) - 1)
    for name in LAYOUTS[layout]:
        layer = models.made[name].attention_layers()[0]
        shards = 1 if name == "mla" or num_decode == 1 else 2
        cache = NUM_LAYERS * NUM_TOKENS * (layer.latent_dim // shards + layer.rope_dim) * 8
        for rank, report in enumerate(answers(layout)):
            report = report[name]
            # A prefill rank hands over to every num_prefill-th decode rank, perhaps to none.
            hands = len(range(rank, num_decode, num_prefill)) if rank < num_prefill else 1
            parts = {"cache": cache, "header": headers, "token": firsts}
            wanted = {purpose: hands * count for purpose, count in parts.items() if hands}
            assert report["bytes"] == wanted | {"meeting": 2 * meetings}
            mine, others = ("sent", "received") if rank < num_prefill else ("received", "sent")
            assert report[mine] == sum(wanted.values()) + meetings
            assert report[others] == meetings


def test_within_a_group_one_sum_a_layer_is_made(answers):
    reports = answers((2, 2))
    steps = sum(request["max_new_tokens"] - 1 for request in REQUESTS)
    for report in reports[:2]:
        assert report["pca"]["sums"] == report["exact norm"]["sums"] == {"output": NUM_LAYERS * len(REQUESTS)}
    for report in reports[2:]:
        assert report["pca"]["sums"] == {"output": NUM_LAYERS * steps}
        assert report["exact norm"]["sums"] == {"output": NUM_LAYERS * steps, "norm": NUM_LAYERS * steps}


def test_layers_arrive_while_the_next_ones_are_computed(models, tmp_path):
    """The prefill of layer 1 is held up until the decode rank has layer 0, which a later sending would not survive."""
    prefill, decode = run_ranks(
        separated.overlap, 2, tmp_path / "ranks", models.folder / "pca", PROMPTS[0], tmp_path / "mark"
    )
    assert "layer 0 is there: True" in prefill
    for index in range(NUM_LAYERS):
        sent = prefill.index(f"sent to take layer {index} of request 0")
        assert sent < prefill.index(f"computed layer {index}")
        assert prefill.index(f"done to take layer {index} of request 0") > prefill.index(
            f"computed layer {NUM_LAYERS - 1}"
        )
    arrivals = [decode.index(f"done to hand over layer {index} of request 0") for index in range(NUM_LAYERS)]
    assert arrivals == sorted(arrivals) and arrivals[-1] < decode.index("computed layer 0")


# Who is lost and when -> whom each survivor waits for in vain, and for what; None where the order is open.
WAITS = {
    (1, "loading"): {0: "rank 0 waited for rank 1 to read the checkpoint's config"},
    (1, "before"): {
        0: "rank 0 waited for rank 1 to sum the output of layer 0",
        3: "rank 3 waited for rank 1 to announce request 0",
    },
    (2, "before"): {
        # The first message or a later one: what was sent before the loss shows may be on its way.
        0: r"rank 0 waited for rank 2 to take (layer \d of )?request 0;",
        # Its layers may still be coming in, from a rank that has given up itself by then.
        3: r"rank 3 waited for rank (2 to sum the output of layer 0|1 to hand over layer \d of request 0)",
    },
    (1, "during"): {
        0: "rank 0 waited for rank 1 to sum the output of layer 2",
        3: "rank 3 waited for rank 1 to hand over layer 2 of request 0",
    },
    (2, "during"): {3: "rank 3 waited for rank 2 to sum the output of layer 0"},
    (1, "after"): {0: "rank 0 waited for rank 1 to finish"},
    (2, "after"): {3: "rank 3 waited for rank 2 to sum the output of layer 0"},
}


@pytest.mark.parametrize(("victim", "moment"), WAITS)
def test_a_killed_rank_ends_in_an_error_on_every_other(victim, moment, models, tmp_path):
    timeout = 3.0
    reports = run_ranks(
        separated.lose, 4, tmp_path / "ranks", models.folder / "pca", victim, moment, signal.SIGKILL, timeout,
        tmp_path / "mark",
    )  # fmt: skip
    assert reports[victim] is None
    for rank, report in enumerate(reports):
        if rank != victim:
            assert report["text"].startswith(f"rank {rank} waited for rank "), report
            assert report["seconds"] < timeout + 2
    for rank, text in WAITS[victim, moment].items():
        assert re.match(text, reports[rank]["text"]), reports[rank]["text"]


@pytest.mark.parametrize(
    ("victim", "moment", "text"),
    [
        (0, "during", "to hand over layer"),
        (3, "after", "to sum the output of layer 0; nothing came within 1 s"),
    ],
)
def test_a_rank_that_stands_still_ends_in_an_error_on_every_other(victim, moment, text, models, tmp_path):
    reports = run_ranks(
        separated.lose, 4, tmp_path / "ranks", models.folder / "pca", victim, moment, signal.SIGSTOP, 1.0,
        tmp_path / "mark", stopped=[victim],
    )  # fmt: skip
    for rank, report in enumerate(reports):
        if rank != victim:
            assert report["text"].startswith(f"rank {rank} waited for rank "), report
            assert report["seconds"] < 1 + 2
    assert text in reports[2]["text"]


def test_roles_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match="prefill_ranks is empty; separation needs at least one rank for each"
    ):
        Roles((), (0, 1))
    with pytest.raises(
        ValueError, match=r"prefill_ranks=\[0, 1\] and decode_ranks=\[1, 2\] name rank 1 twice"
    ):
        Roles((0, 1), (1, 2))
    with pytest.raises(ValueError, match="name rank -1; the first rank is 0"):
        Roles((-1,), (0,))
    with pytest.raises(
        ValueError, match="prefill_ranks=4 of 4 ranks leaves none for one of the tasks; use 1 to"
    ):
        Roles.of(4, 4)
    with pytest.raises(ValueError, match="prefill_ranks=1 of 1 ranks leaves none .*; start at least 2"):
        Roles.of(1, 1)


def test_groups_that_do_not_fit_say_which_would():
    base = tiny_config("deepseek_v3")

    def check(roles: Roles, *entries: dict | None) -> None:
        roles.check(UndividedConfig(base_config=base, attention=list(entries)))

    tpla, mla = {"mechanism": "tpla", "num_shards": 2}, {"mechanism": "mla"}
    check(Roles((0,), (1,)), tpla, tpla)
    check(Roles((0,), (1, 2, 3, 4)), mla, mla)
    with pytest.raises(ValueError, match="3 prefill ranks cannot share num_attention_heads=4; 1, 2, 4 could"):
        check(Roles((0, 1, 2), (3,)), tpla, tpla)
    with pytest.raises(
        ValueError, match="3 decode ranks do not fit num_shards=2 and num_attention_heads=4; 1, 2, 4, 8 would"
    ):
        check(Roles((0,), (1, 2, 3)), tpla, tpla)
    with pytest.raises(ValueError, match="the layers differ in their number of shards"):
        check(Roles((0,), (1, 2)), tpla, mla)
    with pytest.raises(ValueError, match="layer 1 has its native attention; only a prompt read by MLA"):
        check(Roles((0,), (1, 2)), tpla, None)
    with pytest.raises(
        ValueError, match='layer 0 has mechanism "gla"; only a prompt read by MLA is handed over'
    ):
        check(Roles((0,), (1, 2)), {"mechanism": "gla"}, tpla)


def test_every_decode_rank_has_one_sender():
    roles = Roles.of(2, 7)
    assert {rank: roles.receivers(rank) for rank in roles.prefill_ranks} == {0: [2, 4, 6], 1: [3, 5]}
    assert Roles((3,), (0, 1)).sender(1) == 3


def test_packing_leaves_out_the_padding_and_nothing_else():
    batch = RaggedBatch([2, 4, 1])
    cached = torch.randn(3, 1, 4, 5)
    rows = batch.pack(cached[..., :3], cached[..., 3:])
    assert rows.shape == (7, 5)
    assert torch.equal(batch.unpack(rows), cached * batch.mask[:, None, :, None])
    assert batch.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_misuse_is_refused_on_every_rank(tmp_path):
    reports = run_ranks(separated.misuse, 2, tmp_path / "ranks")
    for report in reports:
        assert report[:3] == [
            "the roles name ranks [0, 1, 2], but the process group has ranks 0 to 1; every one needs a task.",
            "prefill_ranks=2 of 2 ranks leaves none for one of the tasks; use 1 to 1.",
            "timeout=0:00:00 must be more than zero.",
        ]
    assert [report[3:] for report in reports] == [
        [
            "rank 0 reads prompts; it calls prefill_and_send.",
            "prompts has an empty prompt, or none; give at least one token each.",
            "max_new_tokens=0 must be at least 1, and temperature=0.0 at least 0.",
        ],
        ["rank 1 decodes; it calls receive_and_decode."] * 2,
    ]


def test_the_command_writes_what_one_process_writes(models, capsys, tmp_path):
    words = ("generate", str(models.folder / "pca"), "the cat", "--max-new-tokens", "12", "--device", "cpu")
    words += ("--temperature", "1.5")
    status, alone, noted = run(capsys, *words)
    assert status == 0 and alone.strip(), noted
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prefill, decode = run_ranks(
        separated.command, 2, tmp_path / "ranks", [*words, "--prefill-ranks", "1"], port
    )
    assert prefill == [0, "", ""]
    assert decode == [0, alone, ""]
    status, printed, noted = run(capsys, *words, "--prefill-ranks", "1")
    assert status == 2 and printed == "" and "--prefill-ranks needs several ranks" in noted
