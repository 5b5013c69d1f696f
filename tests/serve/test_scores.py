"""Log probabilities of prompts, and what else evaluators need. Oracles: transformers' logits, and lm-eval run in-process."""

import json

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lownibble as ln
from lownibble.data import end_tokens
from lownibble.serve.texts import TokenTexts

PROMPTS = ["w1 w5 w9 w11 w3", "w7 w8", "w40 w2 w2 w2 w17 w33"]


def model_of(base, adapters, name):
    model, tokenizer = ln.load(str(base), quant="nf4")
    if name != "base":
        ln.load_adapter(model, adapters / name)
    return model, tokenizer


def log_probabilities(model, ids):
    """(T - 1, V): of each token after the first."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(1)


WORDS = ["▁The", "▁capital", "▁is", "▁Paris", "▁x"]


@pytest.fixture
def spaced(write):
    """A tiny model's folder whose tokenizer keeps spaces at the beginning of words and adds a first token, as Llama 2's does."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    folder = write("llama", name="spaced", max_position_embeddings=256)
    made.save_pretrained(folder)
    return folder, {str(vocab["▁Paris"]): 100}


def test_where_tokens_begin_in_the_text(live, spaced):
    folder, bias = spaced
    client = live(folder).client()
    asked = {"model": "spaced", "echo": True, "logprobs": 0, "max_tokens": 1, "logit_bias": bias}
    choice = client.completions.create(prompt="The capital is", **asked).choices[0]
    assert (choice.text, choice.logprobs.text_offset) == ("The capital is Paris", [0, 0, 3, 11, 14])
    choice = client.completions.create(prompt=[1, 3, 4, 5], **asked).choices[0]  # its text has the special token
    assert choice.text == "<s> The capital is Paris"
    pieces = zip(choice.logprobs.text_offset, [*choice.logprobs.text_offset[1:], None], strict=True)
    assert [choice.text[a:b] for a, b in pieces] == ["<s>", " The", " capital", " is", " Paris"]


def test_an_answer_that_goes_on_keeps_the_space_before_it(live, spaced):
    folder, bias = spaced
    client = live(folder).client()
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The capital is"}]
    asked = {"model": "spaced", "messages": talk, "max_tokens": 2, "logit_bias": bias}
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert client.chat.completions.create(**asked, extra_body=going_on).choices[0].message.content == " Paris Paris"
    assert client.chat.completions.create(**asked).choices[0].message.content == "Paris Paris"


def test_bytes_of_tokens_that_are_part_of_a_character(live, bytes_base):
    client = live(bytes_base).client()
    first, second = (str(token) for token in AutoTokenizer.from_pretrained(bytes_base)("Ȼ").input_ids)
    said = [{"role": "user", "content": "hi"}]
    found = b""
    for token in (first, second):
        asked = {"model": "bytes", "messages": said, "logprobs": True, "max_tokens": 1, "logit_bias": {token: 100}}
        found += bytes(client.chat.completions.create(**asked).choices[0].logprobs.content[0].bytes)
    assert found.decode() == "Ȼ"
    choice = client.completions.create(model="bytes", prompt="é x", echo=True, logprobs=0, max_tokens=1).choices[0]
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("byte", [0x0A, 0xC8])
def test_bytes_of_fallback_tokens(byte):
    core = Tokenizer(models.BPE(vocab={"a": 0, f"<0x{byte:02X}>": 1}, merges=[], byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    assert TokenTexts(PreTrainedTokenizerFast(tokenizer_object=core)).utf8(1) == bytes([byte])


@pytest.mark.parametrize("name", ["base", "one"])
@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo(live, base, adapters, name, as_tokens, max_tokens):
    client = live().client()
    model, tokenizer = model_of(base, adapters, name)
    ids = tokenizer(PROMPTS).input_ids
    answer = client.completions.create(
        model=name, prompt=ids if as_tokens else PROMPTS, echo=True, max_tokens=max_tokens, logprobs=3, temperature=0, seed=1234
    )
    assert answer.usage.completion_tokens == 3 * max_tokens
    for choice, text, prompt in zip(answer.choices, PROMPTS, ids, strict=True):
        told, n = choice.logprobs, len(prompt)
        assert choice.text.startswith(text)
        assert choice.finish_reason == "length"
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == n + max_tokens
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        rows = log_probabilities(model, prompt)
        found, expected = torch.tensor(told.token_logprobs[1:n]), rows.gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
        for top, row in zip(told.top_logprobs[1:n], rows, strict=True):
            assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        pieces = [choice.text[a:b] for a, b in zip(told.text_offset, [*told.text_offset[1:], None], strict=True)]
        assert [piece.strip() for piece in pieces] == [token.strip() for token in told.tokens]
    streamed = list(client.completions.create(
        model=name, prompt=PROMPTS[0], echo=True, max_tokens=max_tokens, logprobs=3, temperature=0, stream=True
    ))  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    told = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert told == answer.choices[0].logprobs.tokens


def test_echo_alone_repeats_the_prompt(live):
    client = live().client()
    asked = {"model": "one", "prompt": "w1  w2", "temperature": 0, "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    plain, echoed = (client.completions.create(**asked, echo=echo) for echo in (False, True))
    assert echoed.choices[0].text == "w1  w2" + plain.choices[0].text
    assert echoed.choices[0].logprobs is None
    streamed = client.completions.create(**asked, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    with pytest.raises(openai.BadRequestError, match="'max_tokens' of 0 is for 'echo'"):
        client.completions.create(**{**asked, "max_tokens": 0})


def test_scores_do_not_come_from_the_cache(live):
    """A prompt whose keys and values are there already is read again, and is there for the next."""
    client = live(max_batch=1).client()
    asked = {"model": "one", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 1, "logprobs": 0}
    first = client.completions.create(**asked, echo=True)
    again = client.completions.create(**asked, echo=True)
    assert again.choices[0].logprobs.token_logprobs == first.choices[0].logprobs.token_logprobs
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    assert client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens == 4


def test_long_prompts_are_scored_in_parts(live, base, adapters, monkeypatch):
    """While others are answered."""
    monkeypatch.setattr("lownibble.serve.engine.PROMPT_TOKENS", 7)
    client = live().client()
    model, _ = model_of(base, adapters, "two")
    prompt = torch.randint(4, 96, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    answer = client.completions.create(model="two", prompt=[prompt, prompt[:20]], echo=True, max_tokens=0, logprobs=0, n=2)
    expected = log_probabilities(model, prompt).gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0].tolist()
    for choice, n in zip(answer.choices, (60, 60, 20, 20), strict=True):
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected[: n - 1], abs=1e-4)


def test_prompt_logprobs(live, base, adapters):
    client = live().client()
    model, tokenizer = model_of(base, adapters, "one")
    ids = tokenizer(PROMPTS[0]).input_ids
    rows = log_probabilities(model, ids)
    whole = client.completions.create(model="one", prompt=PROMPTS[0], max_tokens=1, extra_body={"prompt_logprobs": 2})
    messages = [{"role": "user", "content": PROMPTS[0]}]
    chat = client.chat.completions.create(model="one", messages=messages, max_tokens=1, extra_body={"prompt_logprobs": 2})
    for scores in (whole.choices[0].model_extra["prompt_logprobs"], chat.model_extra["prompt_logprobs"]):
        assert scores[0] is None
        for told, token, row in zip(scores[1:], ids[1:], rows, strict=True):
            order = row.argsort(descending=True).tolist()
            assert set(told) == {str(token), *map(str, order[:2])}
            for key, one in told.items():
                assert one["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-4)
                assert one["rank"] == order.index(int(key)) + 1
                assert one["decoded_token"].strip() == tokenizer.decode([int(key)])


def test_tokenize_and_back(live, base):
    url, (_, tokenizer) = live().url, ln.load(str(base), quant="nf4")
    with httpx.Client(base_url=url) as client:
        found = client.post("/tokenize", json={"model": "one", "prompt": PROMPTS[0], "return_token_strs": True}).json()
        ids = tokenizer(PROMPTS[0]).input_ids
        assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 256)
        assert "".join(found["token_strs"]).strip() == PROMPTS[0]
        chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": PROMPTS[0]}]}).json()
        assert chat["tokens"] == ids
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPTS[0]}
        for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}), ("/detokenize", {"tokens": [96]}),
                           ("/detokenize", {"tokens": [-1]}), ("/tokenize", {"prompt": "\ud800"})):  # fmt: skip
            answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == 400, body
            assert answer.json()["error"]["message"]
        assert client.post("/tokenize", json={"model": "other", "prompt": "a"}).status_code == 404


def test_tokenizing_needs_the_key(live):
    made = live(api_key="secret")
    assert httpx.get(f"{made.url}/tokenizer_info").status_code == 401
    for path, body in (("/tokenize", {"prompt": "w1"}), ("/detokenize", {"tokens": [5]})):
        assert httpx.post(made.url + path, json=body).status_code == 401
        assert httpx.post(made.url + path, json=body, headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_gets_the_scores_that_it_gets_in_process(live, bytes_base, monkeypatch, tokens, backend):
    """Its `local-completions` against the server, its `HFLM` on the same model."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = ln.load(str(bytes_base), quant="nf4")
    url = live(bytes_base).url
    greedy = model.generate(**tokenizer("user ", return_tensors="pt"), max_new_tokens=3, do_sample=False, eos_token_id=None)[0]
    asked = [("user ", "assistant"), ("a system", " is é"), ("w", "name"), ("user ", tokenizer.decode(greedy[-3:]))]
    asked = [pair for pair in asked if "\ufffd" not in pair[1]]

    def requests(kind, arguments):
        return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]

    inside = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    name = str(bytes_base)
    client = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=name, tokenizer_backend=backend, tokenized_requests=tokens,
        batch_size=1 if backend == "remote" else 2, max_length=200,
    )  # fmt: skip
    found = client.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    expected = inside.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    for (score, is_greedy), (wanted, was_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-3)
        assert is_greedy == was_greedy
    texts = [("user assistant system name city",), ("Paris",)]
    rolling = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for lm in (client, inside)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0}
    generated = [lm.generate_until(requests("generate_until", [("user ", dict(options))]), disable_tqdm=True)
                 for lm in (client, inside)]  # fmt: skip
    assert generated[0] == [text.rstrip("\ufffd") for text in generated[1]]  # the server tells no part of a character
    assert generated[0][0]


TASKS = {
    "whole_choice": """
output_type: multiple_choice
doc_to_choice: ["user", "system", "Paris"]
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "whole_text": """
output_type: generate_until
doc_to_target: "{{text[:2]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list:
  - metric: exact_match
""",
    "whole_rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
}


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
def test_whole_tasks_of_lm_eval_score_the_same(live, bytes_base, tmp_path):
    """`--model local-completions` against the server, `lownibble eval --harness` in-process: scores and every sample."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": text, "label": n % 3} for n, text in enumerate(("user name", "a system", "weather", "city", "is it", "Paris"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        text = "''" if "rolling" in name else "'{{text}} '"
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test"
        )
        (tmp_path / f"{name}.yaml").write_text(f"{head}\ndoc_to_text: {text}{task}")
    model, tokenizer = ln.load(str(bytes_base), quant="nf4")
    model.generation_config.eos_token_id = sorted(end_tokens(model, tokenizer))
    url = live(bytes_base).url
    options = {"tasks": list(TASKS), "task_manager": TaskManager(include_path=str(tmp_path)), "bootstrap_iters": 0}
    inside = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), **options)
    arguments = f"model=bytes,base_url={url}/v1/completions,tokenizer={bytes_base},max_length=250"
    served = simple_evaluate("local-completions", model_args=arguments, **options)
    assert served["results"].keys() == inside["results"].keys() == TASKS.keys()
    for name in TASKS:
        figures = {key: value for key, value in inside["results"][name].items() if isinstance(value, float)}
        assert figures
        assert {key: served["results"][name][key] for key in figures} == pytest.approx(figures, abs=1e-4)
        said = [[sample["filtered_resps"] for sample in found["samples"][name]] for found in (served, inside)]
        assert len(said[0]) == len(rows)
        if name == "whole_text":
            assert said[0] == [[text.rstrip("\ufffd") for text in each] for each in said[1]]
