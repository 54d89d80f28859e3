"""What a chat on the command line has in hand, and the lines that begin with "/"."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from PIL import Image

from ..files.reading import read_json
from ..images.processing import frames, open_image
from ..models.config import Settings, read
from .conversation import Conversation, Talker
from .conversation_file import resume, save

COMMANDS = {"/image": "PICTURE", "/video": "FILE", "/new": "", "/save": "FILE", "/resume": "FILE", "/quit": ""}
FRAMES = Settings.num_video_frames


def frames_of(folder: Path) -> int:
    """How many frames of a video the model of a folder is shown; read without loading it."""
    path = folder / "config.json"
    return read(Settings, read_json(path), str(path)).num_video_frames if path.exists() else FRAMES


def pictures(seen: Sequence[tuple[str, str]], n: int) -> list[Image.Image]:
    """Images and n frames of each video, given as (kind, path), in their order. Errors: `ImageError`."""
    found = [[open_image(path)] if kind == "image" else frames(path, n) for kind, path in seen]
    return [picture for some in found for picture in some]


@dataclass
class Session:
    """A conversation, and the pictures for its next question."""

    talker: Talker
    conversation: Conversation
    frames: int
    pictures: list[Image.Image] = field(default_factory=list)

    def obey(self, line: str) -> None:
        """A line that is no question. Errors: ValueError, OSError; nothing has changed then."""
        command, _, name = line.partition(" ")
        name = name.strip()
        if command not in COMMANDS:
            near = get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"no command {command!r}; {hint}There are {', '.join(map(usage, COMMANDS))}")
        if bool(name) != bool(COMMANDS[command]):
            raise ValueError(f"{line!r}: expected {usage(command)}")
        if command == "/new":
            self.conversation = Conversation(self.talker)
        elif command in ("/image", "/video"):
            self.pictures += pictures([(command[1:], name)], self.frames)
        elif command == "/save":
            save(self.conversation, Path(name))
        else:
            self.conversation = resume(self.talker, Path(name))


def usage(command: str) -> str:
    return f"{command} {COMMANDS[command]}".strip()
