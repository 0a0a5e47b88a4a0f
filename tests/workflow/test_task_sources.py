"""What tasks and zero-shot texts need: files of this machine are inputs, the rest is fetched."""

import pytest
from questions import write_generation, write_task

from halfstep.config import Evaluation
from halfstep.workflow.task_sources import faults_of_tasks, files_of, tasks_of_hub, texts_of_hub

ROWS = [{"question": "a", "choices": ["b", "c"], "label": 0}]


def test_names_are_fetched_and_files_are_not():
    names = ["paloma_ptb", "ptb", "owner/set:en", "mine.txt", "mine.jsonl.gz", "mine.yaml"]
    asked = Evaluation(tasks=["piqa", "mine.yaml"], perplexity=names)
    assert tasks_of_hub(asked) == ["task:piqa"]
    assert texts_of_hub(asked) == [
        "task:paloma_ptb",
        "parquet:ptb-text-only/ptb_text_only:penn_treebank/validation",
        "parquet:owner/set:en/test",
    ]


def test_the_data_of_a_task_are_inputs_with_its_file(tmp_path):
    """So that new questions are asked anew. Functions of the task are not run."""
    task = write_task(tmp_path, "mine", ROWS)
    text = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text + "process_docs: !function utils.process\n")
    assert files_of([task, "piqa", "mine.txt"]) == [task, "mine.txt", str(tmp_path / "mine.jsonl")]
    (tmp_path / "broken.yaml").write_text("task: [")
    assert files_of([str(tmp_path / "broken.yaml")]) == [str(tmp_path / "broken.yaml")]


def test_files_of_the_graph_are_no_inputs_of_a_task(tmp_path, monkeypatch):
    """They are there only after the first run, which would then not be the same as the second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/data").mkdir(parents=True)
    task = write_task(tmp_path / "results/data", "mine", ROWS)
    text = (tmp_path / "results/data/mine.yaml").read_text()
    (tmp_path / "here.yaml").write_text(text.replace(f"{tmp_path}/", ""))
    assert files_of(["here.yaml"]) == ["here.yaml"] and len(files_of([task])) == 2


def test_written_answers_without_step_counts_are_a_fault_at_once(tmp_path):
    task = write_generation(tmp_path, "mine", [{"question": "who", "answer": "Tom"}])
    (fault,) = faults_of_tasks(Evaluation(tasks=[task]))
    assert "mine.yaml asks for written text (generate_until), but found no step counts" in fault
    assert not faults_of_tasks(Evaluation(tasks=[task], task_steps=["own"]))
    assert not faults_of_tasks(Evaluation(tasks=[write_task(tmp_path, "chosen", ROWS)]))


@pytest.mark.parametrize("key", ["tasks", "perplexity"])
def test_a_file_that_is_not_there_is_one_sentence(tmp_path, key):
    gone, folder = str(tmp_path / "gone.yaml"), tmp_path / "folder.yaml"
    folder.mkdir()
    first, second = faults_of_tasks(Evaluation(**{key: [gone, str(folder), "piqa"]}))
    assert first.startswith(f"evaluation.{key}: {gone} cannot be read")
    assert "is a folder" in second
