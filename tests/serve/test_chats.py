"""Prompts of chats, and where answers stop. Oracles: `apply_chat_template`, and the same answer without the stop."""

import httpx
import openai
import pytest
from transformers import AutoTokenizer

SAID = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def chat(live, bytes_base):
    """(url, client, tokenizer) of a server on the byte-level model."""
    made = live(bytes_base, max_context=512)
    return made.url, made.client(), AutoTokenizer.from_pretrained(bytes_base)


def rendered(url, tokenizer, **options):
    answer = httpx.post(f"{url}/tokenize", json=options)
    assert answer.status_code == 200, answer.text
    return tokenizer.decode(answer.json()["tokens"])


def test_how_messages_are_rendered(chat):
    url, client, tokenizer = chat
    talk = [*SAID, {"role": "assistant", "content": "Hello wor"}]

    def expected(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert rendered(url, tokenizer, messages=SAID) == expected(SAID, add_generation_prompt=True)
    assert rendered(url, tokenizer, messages=SAID, add_generation_prompt=False) == expected(SAID)
    going_on = expected(talk, continue_final_message=True)
    assert rendered(url, tokenizer, messages=talk, continue_final_message=True) == going_on
    assert going_on.endswith("Hello wor")
    hinted = rendered(url, tokenizer, messages=SAID, chat_template_kwargs={"hint": "<think>"})
    assert hinted == expected(SAID, add_generation_prompt=True) + "<think>"
    developer = [{"role": "developer", "content": "Be brief."}, *SAID]
    system = [{"role": "system", "content": "Be brief."}, *SAID]
    assert rendered(url, tokenizer, messages=developer) == expected(system, add_generation_prompt=True)
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert rendered(url, tokenizer, messages=parts) == expected(SAID, add_generation_prompt=True)
    asked = {"model": "bytes", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    told = client.chat.completions.create(messages=SAID, **asked)
    same = client.completions.create(prompt=tokenizer(rendered(url, tokenizer, messages=SAID)).input_ids, **asked)
    assert told.choices[0].message.content == same.choices[0].text
    with pytest.raises(openai.BadRequestError, match=r"has no variable 'enable_thinking'\. It has: hint"):
        client.chat.completions.create(
            messages=SAID, model="bytes", extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        )


def test_a_template_that_knows_developers_gets_them(live, bytes_base):
    tokenizer = AutoTokenizer.from_pretrained(bytes_base)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'developer' %}DEV {% endif %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(bytes_base)
    messages = [{"role": "developer", "content": "Be brief."}, *SAID]
    assert rendered(live(bytes_base).url, tokenizer, messages=messages) == "DEV Be brief.Hi"


def test_what_a_template_leaves_out_is_refused(live, bytes_base):
    tokenizer = AutoTokenizer.from_pretrained(bytes_base)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(bytes_base)
    client = live(bytes_base).client()
    with pytest.raises(openai.BadRequestError, match="leaves out message 1, whose role is 'system'"):
        client.chat.completions.create(model="bytes", messages=[{"role": "system", "content": "Be brief."}, *SAID])


def test_an_answer_ends_with_the_turn(chat):
    """With the token that the template ends turns with, which is not the end of sequence."""
    _, client, tokenizer = chat
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    biased = {"model": "bytes", "messages": SAID, "temperature": 0, "max_tokens": 9, "logit_bias": {str(end): 100}}
    stopped = client.chat.completions.create(**biased)
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    assert stopped.choices[0].message.content == ""
    ignored = client.chat.completions.create(**biased, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 9)
    by_text = client.chat.completions.create(**biased, stop="<|im_end|>", extra_body={"ignore_eos": True})
    assert (by_text.choices[0].finish_reason, by_text.usage.completion_tokens) == ("stop", 1)


def test_stops_of_a_request(chat):
    _, client, tokenizer = chat
    asked = {"model": "bytes", "messages": SAID, "temperature": 0, "max_tokens": 9, "logprobs": True}
    free = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    ids = [tokenizer.convert_tokens_to_ids(one.token) for one in free.choices[0].logprobs.content]
    at = next(n for n in range(1, 9) if ids[n] not in (None, tokenizer.unk_token_id) and ids[n] not in ids[:n])
    cut = client.chat.completions.create(**asked, extra_body={"ignore_eos": True, "stop_token_ids": [ids[at]]})
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("stop", at + 1)
    assert len(cut.choices[0].logprobs.content) == at
    special = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    stopped = client.chat.completions.create(**asked, stop=["never", "<|eot_id|>"], logit_bias={str(special): 100})
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "")


def test_options_without_effect_are_named_and_nulls_are_nothing(chat):
    url, client, _ = chat
    asked = {"model": "bytes", "messages": SAID, "temperature": 0, "max_tokens": 4}
    plain = client.chat.completions.create(**asked)
    assert "ignored" not in plain.model_extra
    noted = client.chat.completions.create(**asked, user="me", metadata={"a": "b"}, store=False, service_tier="auto")
    assert noted.model_extra["ignored"] == ["user", "metadata", "store", "service_tier"]
    assert noted.choices[0].message.content == plain.choices[0].message.content
    named = client.chat.completions.create(**{**asked, "messages": [{**SAID[0], "name": "Ann"}]})
    assert named.model_extra["ignored"] == ["messages.0.name"]
    nulls = {
        "top_p": None,
        "n": None,
        "tools": None,
        "logit_bias": None,
        "whatever": None,
        "ignore_eos": None,
        "response_format": None,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json={**asked, **nulls, "min_tokens": 0, "best_of": 1}).json()
    assert answer["choices"][0]["message"]["content"] == plain.choices[0].message.content


def test_every_option_by_the_openai_client(chat):
    """As it sends them; each makes a difference, or is answered with what was asked for."""
    _, client, tokenizer = chat
    create = client.chat.completions.create
    asked = {"model": "bytes", "messages": SAID, "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    plain = create(**asked).choices[0].message.content
    changed = {
        "frequency_penalty": 2.0, "presence_penalty": 2.0, "logit_bias": {str(tokenizer("a").input_ids[0]): 100},
    }  # fmt: skip
    for name, value in changed.items():
        assert create(**asked, **{name: value}).choices[0].message.content != plain, name
    assert create(**{**asked, "extra_body": {"ignore_eos": True, "repetition_penalty": 1.8}}).choices[0].message.content != plain
    hot = {**asked, "temperature": 2.0, "seed": 1}
    for name, value in (("top_k", 1), ("min_p", 1.0)):
        assert create(**{**hot, "extra_body": {"ignore_eos": True, name: value}}).choices[0].message.content == plain, name
    assert create(**hot).choices[0].message.content != plain
    assert create(**hot, top_p=1e-9).choices[0].message.content == plain
    assert create(**hot).choices[0].message.content == create(**hot).choices[0].message.content
