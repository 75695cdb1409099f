"""The prompts of the three protocols, as others have published them."""

from __future__ import annotations

import hashlib

import pytest

from eval.suites import instruct, letters, loglik

ARC = {
    "question": "Which two things interact most in the water cycle?",
    "choices": {
        "text": ["oceans and the Moon", "oceans and the Sun", "lakes and the Moon", "lakes and the Sun"],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "B",
}
PIQA = {"goal": "Retain study notes.", "sol1": "Read them.", "sol2": "Burn them.", "label": 0}
SIQA = {
    "context": "Robin cut the sandwich.",
    "question": "What next?",
    "answerA": "eat",
    "answerB": "sleep",
    "answerC": "run",
    "label": "3",
}
HELLASWAG = {
    "activity_label": "Playing drums",
    "ctx_a": "People [header] stand.",
    "ctx_b": "a man",
    "ctx": "People stand. a man",
    "endings": ["begins [step] to play.", "leaves [title] Then rain falls.", "sits.", "sings."],
    "label": "0",
}
WINOGRANDE = {
    "sentence": "The jeans fit worse than the shirt because I had tried the _ on at the _ store.",
    "option1": "jeans",
    "option2": "shirt",
    "answer": "2",
}


def _instruction(prompt: str) -> str:
    before, after = instruct.PROMPT.split("{instruction}")
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    return prompt[len(before) : -len(after)]


@pytest.mark.parametrize(
    ("template", "digest"),
    [
        # of the bytes in commonsense_evaluate.py and finetune.py
        (instruct.PROMPT, "f057f5a4b3dcb308842e19e0ef8e9ff21888077113caa4ecefcae2bf9e494efa"),
        (instruct.TRAINING_PROMPT, "05ae326ba5e4fdd07840eb254a6b7aee51073651b062aec52876c2f7ef8f9805"),
    ],
)
def test_llm_adapters_templates_are_pinned(template: str, digest: str) -> None:
    assert hashlib.sha256(template.encode()).hexdigest() == digest


def test_llm_adapters_two_templates_differ_where_the_authors_do() -> None:
    assert "request. \n\n    " in instruct.PROMPT
    assert "request.  \n\n    " in instruct.TRAINING_PROMPT
    assert instruct.PROMPT.endswith("### Response:\n" + 16 * " ")


def test_llm_adapters_instructions() -> None:
    assert _instruction(instruct.arc(ARC)) == (
        "Please choose the correct answer to the question: Which two things interact most in the water cycle?\n\n"
        "Answer1: oceans and the Moon Answer2: oceans and the Sun Answer3: lakes and the Moon "
        "Answer4: lakes and the Sun\n\nAnswer format: answer1/answer2/answer3/answer4"
    )
    assert _instruction(instruct.boolq({"question": "is it margarine"})) == (
        "Please answer the following question with true or false, question: is it margarine?\n\n"
        "Answer format: true/false"
    )
    assert _instruction(instruct.piqa(PIQA)) == (
        "Please choose the correct solution to the question: Retain study notes.\n\nSolution1: Read them.\n\n"
        "Solution2: Burn them.\n\nAnswer format: solution1/solution2"
    )
    assert _instruction(instruct.social_i_qa(SIQA)).endswith(
        "question: Robin cut the sandwich. What next?\n\nAnswer1: eat Answer2: sleep Answer3: run\n\n"
        "Answer format: answer1/answer2/answer3"
    )
    assert _instruction(instruct.winogrande(WINOGRANDE)).endswith(
        "store.\n\nOption1: jeans Option2: shirt Answer format: option1/option2"
    )
    assert _instruction(instruct.hellaswag(HELLASWAG)).startswith(
        "Please choose the correct ending to complete the given sentence: Playing drums: People stand. a man\n\nEnding"
    )


@pytest.mark.parametrize(
    ("generated", "right", "unparsable"),
    [
        ("the correct answer is answer2", 1, 0),
        ("answer2, not answer1", 1, 0),
        ("answer1 or answer2", 0, 0),
        ("the second", 0, 1),
        ("", 0, 1),
    ],
)
def test_the_first_answer_that_is_named_counts(generated: str, right: float, unparsable: float) -> None:
    assert instruct.arc_score(ARC, [generated]) == {"acc": right, "unparsable": unparsable}


def test_targets_of_generation() -> None:
    assert instruct.arc_target(ARC) == "the correct answer is answer2"
    assert instruct.boolq_target({"answer": False}) == "the correct answer is false"
    assert instruct.piqa_target(PIQA) == "the correct answer is solution1"
    assert instruct.social_i_qa_target(SIQA) == "the correct answer is answer3"
    assert instruct.hellaswag_target(HELLASWAG) == "the correct answer is ending1"
    assert instruct.winogrande_target(WINOGRANDE) == "the correct answer is option2"
    for row, score, target in (
        (SIQA, instruct.social_i_qa_score, instruct.social_i_qa_target),
        (HELLASWAG, instruct.hellaswag_score, instruct.hellaswag_target),
        (WINOGRANDE, instruct.winogrande_score, instruct.winogrande_target),
    ):
        assert score(row, [target(row)]) == {"acc": 1, "unparsable": 0}


def test_mixloras_prompts() -> None:
    assert letters.arc(ARC) == (
        "Please choose the correct answer to the question: Which two things interact most in the water cycle? "
        "(A) oceans and the Moon (B) oceans and the Sun (C) lakes and the Moon (D) lakes and the Sun\nAnswer:"
    )
    assert letters.boolq({"question": "is it"}) == (
        "Please answer the following question with true or false: is it?\nAnswer:"
    )
    assert letters.piqa(PIQA).endswith(
        "task:\nRetain study notes.\n\n(A) Read them.\n(B) Burn them.\n\nCorrect solution:"
    )
    assert letters.social_i_qa(SIQA) == (
        "Please choose the correct answer to the question.\nQuestion: Robin cut the sandwich. What next?\n(A) eat\n"
        "(B) sleep\n(C) run\nAnswer:"
    )
    assert letters.winogrande(WINOGRANDE).endswith("store.\n(A) jeans\n(B) shirt\nAnswer:")
    assert "\nSentence: Playing drums. People stand. a man\n(A) begins" in letters.hellaswag(HELLASWAG)


def test_the_harness_rows() -> None:
    import datasets

    (row,) = loglik.hellaswag_rows(datasets.Dataset.from_list([HELLASWAG]))
    assert row["query"] == "Playing drums: People stand. A man"
    assert row["choices"][:2] == ["begins to play.", "leaves. Then rain falls."]
    assert row["gold"] == 0
    assert loglik.winogrande_gold(WINOGRANDE) == 1
    assert loglik.winogrande_ending(WINOGRANDE) == "on at the _ store."
    assert loglik.winogrande_beginnings(WINOGRANDE)[1].endswith("because I had tried the shirt")
