import gzip
import json
from pathlib import Path

from ray_ds.data.conversations import as_messages
from ray_ds.data.sample_chats import CHATS_FILE, write_sample_chats


def test_sample_chats_are_questions_and_answers_and_always_the_same(tmp_path: Path) -> None:
    count = write_sample_chats(str(tmp_path))
    data = (tmp_path / CHATS_FILE).read_bytes()
    chats = [as_messages(json.loads(line), "messages", "user") for line in gzip.decompress(data).splitlines()]
    assert len(chats) == count > 3000
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    assert all(message["content"].strip() for chat in chats for message in chat)
    texts = {chat[0]["content"]: chat[1]["content"] for chat in chats}
    assert texts["What is torch?"].startswith("torch: ")
    write_sample_chats(str(tmp_path))
    assert (tmp_path / CHATS_FILE).read_bytes() == data
