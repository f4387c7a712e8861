"""Differences from dense attention: ours beside those that the paper prints."""

from collections.abc import Iterator, Sequence

from experiments.common.kv_cache import is_compression
from experiments.report import paper
from experiments.report.markdown import Block, points, table
from experiments.report.paper import Printed
from experiments.report.scores import Scored, base_of, cells_of, difference, interval

# The paper's names of families, and of those that keep SnapKV's keys.
_METHODS = {
    "minference": "MInference",
    "patterns": "MInference",
    "static": "MInference, static",
    "a_shape": "StreamingLLM",
    "streaming_dilated": "StreamingLLM, dilated",
    "streaming_strided": "StreamingLLM, strided",
    "inf_llm": "InfLLM",
    "block_sparse": "only block-sparse",
    "vertical_slash": "only vertical-slash",
}
_WITH_SNAPKV = {
    "dense": "full, SnapKV",
    "minference": "MInference, SnapKV",
    "patterns": "MInference, SnapKV",
}
_TASKS = {
    "longbook_sum_eng": "En.Sum",
    "longbook_qa_eng": "En.QA",
    "longbook_choice_eng": "En.MC",
    "longdialogue_qa_eng": "En.Dia",
    "longbook_qa_chn": "Zh.QA",
    "code_debug": "Code.Debug",
    "math_find": "Math.Find",
    "passkey": "PassKey",
    "number_string": "Num",
    "kv_retrieval": "KV",
}
_LENGTHS = {1024 * number: f"{number}K" for number in (4, 8, 16, 32, 64, 128)}
_PRINTED = {"ruler": paper.RULER, "infinitebench": (*paper.INFINITEBENCH, paper.SNAPKV)}


def split_kept(label: str) -> tuple[str, str | None]:
    """Returns a method's attention, and what it keeps of the prompt for decoding if not all."""
    attention, plus, kept = label.rpartition("+")
    return (attention, kept) if plus and is_compression(kept) else (label, None)


def beside_paper(study: Scored) -> Iterator[Block]:
    """Yields a table of differences, ours and the paper's, if they have methods in common."""
    base = base_of(study)
    if study.kind not in _PRINTED or base is None:
        return
    columns: dict[str, list[tuple[str, int]]] = {}
    for task, length in cells_of(study):
        name = _LENGTHS.get(length) if study.kind == "ruler" else _TASKS.get(task)
        if name is not None:
            columns.setdefault(name, []).append((task, length))
    rows = []
    for label in study.methods:
        cells = []
        for name, group in columns.items():
            printed = _printed(_PRINTED[study.kind], label, name)
            ours = interval(difference(study, label, group, base), points)
            cells.append(f"{ours}; {printed}" if printed else "")
        if any(cells):
            rows.append([label, *cells])
    if rows:
        yield (
            "Over dense attention, points: ours, and behind the semicolon the paper's of "
            f"{', '.join(dict.fromkeys(one.model for one in _PRINTED[study.kind]))}, where printed:"
        )
        yield table(["method", *columns], rows)


def _printed(tables: Sequence[Printed], label: str, column: str) -> str:
    """The paper's differences of a method, of each model that it prints."""
    attention, kept = split_kept(label)
    family = attention.partition(":")[0]
    method = _METHODS.get(family)
    if kept is not None:
        method = _WITH_SNAPKV.get(family) if kept.startswith("snapkv") else None
    if method is None:
        return ""
    found = {
        one.model: value for one in tables if (value := one.difference(method, column)) is not None
    }
    return ", ".join(points(value / 100) for value in found.values())
