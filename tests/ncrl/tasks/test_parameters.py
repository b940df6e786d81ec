"""Every count of the paper's Table 9 that can be reached is, from `configs/tasks/`."""

import re
from pathlib import Path

import pytest

from ncrl.tasks.parameters import (
    CONFIGS,
    ParameterCount,
    count_file,
    main,
    short,
    table,
)
from ncrl.tasks.recipes import Recipe, count_parameters, outline_network

# (file, variant, our parameters, the paper's)
REACHED = [
    # column "original"
    ("mnist", "linear", 7_840, 7.8e3),
    ("cifar_mlp", "linear", 1_707_274, 1.7e6),
    ("cifar_mlp", "linear_cifar100", 1_730_404, 1.7e6),
    ("cifar_lenet", "linear", 2_133_080, 2.1e6),
    ("cifar_lenet", "linear_cifar100", 2_178_170, 2.1e6),
    ("cifar_densenet", "linear", 6_979_642, 7.0e6),
    ("cifar_densenet", "linear_cifar100", 7_084_852, 7.0e6),
    ("polynomial", "linear", 3_489, 3.4e3),
    ("atari", "linear", 3_255_795, 3.2e6),
    ("algorithms", "linear", 308_215, 308e3),
    ("algorithms", "linear_8_outputs", 307_944, 308e3),
    ("split_mnist", "linear", 328_194, 328e3),
    ("split_cifar", "linear", 12_690_514, 12.6e6),
    # columns "MOE", "NSM", "HyperNet" and "FiLM"
    ("cifar_mlp", "moe", 15_116_776, 15.4e6),
    ("cifar_lenet", "nsm", 26_937_338, 27.1e6),
    ("algorithms", "nsm", 264_183, 264e3),
    ("split_mnist", "nsm", 2_295_920, 2.3e6),
    ("polynomial", "hypernet", 3_529, 3.5e3),
    ("atari", "hypernet", 3_650_419, 3.6e6),
    ("polynomial", "film", 3_555, 3.6e3),
    ("algorithms", "film", 252_673, 254e3),
    # column "Neurocoder"
    ("mnist", "", 7_466, 7.3e3),
    ("cifar_mlp", "", 1_882_226, 1.9e6),
    ("cifar_mlp", "cifar100", 1_909_316, 1.9e6),
    ("cifar_mlp", "all_layers", 1_984_782, 1.9e6),
    ("cifar_lenet", "", 2_235_328, 2.3e6),
    ("cifar_lenet", "cifar100", 2_284_378, 2.3e6),
    ("cifar_densenet", "", 7_272_420, 7.3e6),
    ("cifar_densenet", "cifar100", 7_381_590, 7.3e6),
    ("polynomial", "j1", 3_633, 3.6e3),
    ("polynomial", "", 2_146, 2.1e3),
    ("atari", "", 3_450_463, 3.3e6),
    ("atari", "controller_4", 3_403_751, 3.3e6),
    ("atari", "gate_slot", 3_430_415, 3.3e6),
    ("algorithms", "", 255_019, 255e3),
    ("split_mnist", "", 342_452, 348e3),
    ("split_mnist", "logs", 413_342, 423_539),
    ("split_cifar", "", 12_529_070, 12.6e6),
    # the same column, with the authors' published layer
    ("cifar_mlp", "official_no_usage", 1_939_700, 1.9e6),
    ("cifar_lenet", "official", 2_320_934, 2.3e6),
    ("cifar_lenet", "official_cifar100", 2_369_174, 2.3e6),
    ("cifar_densenet", "official", 7_405_304, 7.3e6),
    ("cifar_densenet", "official_cifar100", 7_513_664, 7.3e6),
    ("polynomial", "official_j1", 3_600, 3.6e3),
    ("polynomial", "official", 2_117, 2.1e3),
    ("polynomial", "official_cb", 2_150, 2.1e3),
    ("algorithms", "official", 255_417, 255e3),
    ("split_mnist", "official", 348_083, 348e3),
    ("split_mnist", "official_logs", 423_539, 423_539),
    ("split_cifar", "official", 12_495_768, 12.6e6),
]

NOT_REACHED = {
    ("cifar_mlp", "nsm", 21.2e6),
    ("cifar_lenet", "moe", 12.3e6),
    ("cifar_densenet", "moe", 20.5e6),
    ("cifar_densenet", "nsm", 16.7e6),
    ("mnist", "official", 7.3e3),
    ("cifar_mlp", "official", 1.9e6),
    ("atari", "official", 3.3e6),
}

TABLE_9 = [
    *(7.8e3, 7.3e3),
    *(1.7e6, 2.1e6, 7.0e6, 15.4e6, 12.3e6, 20.5e6, 21.2e6, 27.1e6, 16.7e6, 1.9e6, 2.3e6, 7.3e6),
    *(3.4e3, 3.5e3, 3.6e3, 2.1e3),
    *(3.2e6, 3.6e6, 3.3e6),
    *(308e3, 264e3, 254e3, 255e3),
    *(328e3, 2.3e6, 348e3),
    12.6e6,
]


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str], ParameterCount]:
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        for one in count_file(path):
            file, _, variant = one.name.partition(".yaml")
            found[file, variant.removeprefix(": ")] = one
    return found


@pytest.mark.parametrize(("file", "variant", "count", "paper"), REACHED)
def test_a_count_of_the_paper_is_reached(
    counts: dict[tuple[str, str], ParameterCount], file: str, variant: str, count: int, paper: float
) -> None:
    row = counts[file, variant]
    assert row.parameters == count
    assert row.recipe.paper_parameters == paper
    assert abs(count - paper) <= 0.05 * paper
    assert row.reached


def test_what_is_not_reached_is_listed_with_a_reason(
    counts: dict[tuple[str, str], ParameterCount],
) -> None:
    missed = {key: row for key, row in counts.items() if not row.reached}
    assert {(*key, row.recipe.paper_parameters) for key, row in missed.items()} == NOT_REACHED
    assert all(row.recipe.note for row in missed.values())
    lines = table(list(missed.values())).splitlines()[2:]
    assert all("not reached: " in line for line in lines) and len(lines) == len(missed)


def test_the_whole_of_table_9_is_there(counts: dict[tuple[str, str], ParameterCount]) -> None:
    printed = {row.recipe.paper_parameters for row in counts.values()}
    assert set(TABLE_9) <= printed
    assert printed - set(TABLE_9) == {None, 423_539}
    expected = {(file, variant) for file, variant, *_ in [*REACHED, *NOT_REACHED]}
    assert {key for key, row in counts.items() if row.recipe.paper_parameters} == expected


def test_a_count_that_the_paper_does_not_print(
    counts: dict[tuple[str, str], ParameterCount],
) -> None:
    row = counts["split_mnist", "official_logs_task_incremental"]
    assert row.parameters == 757_431
    assert row.difference is None and row.reached


def test_buffers_are_not_counted_and_frozen_weights_are() -> None:
    options = {"in_features": 5, "num_features": 3, "num_outputs": 2}
    assert count_parameters(outline_network(Recipe(network_options=options))) == 3 * 2 + 2
    frozen = Recipe(network="resnet_mlp", network_options={"hidden": [], "num_outputs": 2})
    assert count_parameters(outline_network(frozen)) == 11_689_512 + 1000 * 2 + 2


def test_counts_are_printed_as_in_the_paper() -> None:
    texts = ["7.3K", "255K", "1.9M", "7.0M", "12.6M"]
    assert [short(x) for x in (7.3e3, 255e3, 1.9e6, 7.0e6, 12.6e6)] == texts


def test_the_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CONFIGS / "mnist.yaml"), str(CONFIGS / "cifar_lenet.yaml")]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "| mnist.yaml | projected_linear | neurocoder | 7,466 | 7.3K | +2.3% |  |" in lines
    assert "| cifar_lenet.yaml: linear | lenet | linear | 2,133,080 | 2.1M | +1.6% |  |" in lines
    assert "| mnist.yaml: maps_j5 | projected_linear | neurocoder | 8,626 |  |  |  |" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {8}
    assert lines[-1] == "9 of 11 recipes reach the paper's count within 5%."


def test_the_command_counts_everything(
    counts: dict[tuple[str, str], ParameterCount],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def counted_before(path: Path) -> list[ParameterCount]:
        return [one for (file, _), one in counts.items() if file == path.stem]

    monkeypatch.setattr("ncrl.tasks.parameters.count_file", counted_before)
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{len(REACHED)} of {len(REACHED) + len(NOT_REACHED)} recipes" in printed.out
    assert "atari.yaml: hypernet" in printed.out and "pong" not in printed.out


BAD = [
    (["no/such.yaml"], "cannot read no/such.yaml"),
    ([str(CONFIGS)], "cannot read"),
    (["--config", "x"], "unknown argument '--config'"),
    ([__file__], "cannot read|must hold settings"),
]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says which ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_ends_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refusal(arguments, capsys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer: neurocoder\nlayer_options: {num_slots: -1}", "num_slots must be an integer"),
        ("layer: neurocoder\nlayer_options: {num_slots: ten}", "num_slots must be an integer"),
        ("layer: nsm\nlayer_options: {cosine: tru}", "cosine must be one of"),
        (
            "network_options: {num_features: 0}",
            "num_features must be an integer of at least 1, got 0",
        ),
        ("network_options: {num_features: many}", "num_features must be an integer of at least 1"),
    ],
)
def test_impossible_sizes_name_the_file(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"task: mnist\nnetwork: projected_linear\n{text}\n")
    error = refusal([str(path)], capsys)
    assert "mine.yaml" in error and message in error
