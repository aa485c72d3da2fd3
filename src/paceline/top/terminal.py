"""`paceline top` on the screen: what the server pushes, until `q`.

A thread reads the stream, as `paceline loads --watch` does, and begins anew where the server has gone; the screen shows
what was last, and says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from paceline.control import Control, ControlError
from paceline.top import view

AGAIN_S = 1.0
WORDS = 5
MODES = ("keep", "wait", "abort")


class Top(App[None]):
    """`control`: the deployment."""

    CSS = """
    #head { height: auto; }
    #lanes { height: 1fr; }
    #words { height: auto; max-height: 5; border-top: solid $panel; }
    #fronts { height: auto; max-height: 3; color: $text-muted; }
    Proposal { align: center middle; }
    Proposal > Static { width: 64; max-width: 90%; padding: 1 2; background: $surface; border: thick $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"), ("p", "propose('pause')", "Pause"), ("r", "propose('resume')", "Resume"),
    ]  # fmt: skip
    ENABLE_COMMAND_PALETTE = False

    class Pushed(Message):
        """A new state; `before`: with the 15 minutes before it."""

        def __init__(self, said: view.State, before: view.State | None = None) -> None:
            super().__init__()
            self.said, self.before = said, before

    class Lost(Message):
        """Nothing is heard of the server. `why`: one line."""

        def __init__(self, why: str) -> None:
            super().__init__()
            self.why = why

    class Refused(Message):
        """What was asked for was not done."""

        def __init__(self, why: str) -> None:
            super().__init__()
            self.why = why

    def __init__(self, control: Control) -> None:
        super().__init__()
        self._control = control
        self._past = view.Past()
        self._said: view.State | None = None
        self._lost = ""
        self._ended = threading.Event()

    def compose(self) -> ComposeResult:
        yield Static("", id="head")
        yield Static("", id="bands")
        yield Static("", id="columns")
        with VerticalScroll(id="lanes"):
            yield Static("", id="ranks")
        yield Static("", id="words")
        yield Static("", id="fronts")
        yield Footer()

    def on_mount(self) -> None:
        self.title = "paceline top"
        self.query_one("#lanes").focus()
        _in_background(self._watch)

    def on_unmount(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                before: view.State | None = self._control.dashboard_before()
                for said in self._control.watch_dashboard():
                    if self._ended.is_set():
                        return
                    self.post_message(self.Pushed(said, before))
                    before = None
            except ControlError as error:
                self.post_message(self.Lost(str(error)))
            self._ended.wait(AGAIN_S)

    @on(Pushed)
    def _pushed(self, event: Pushed) -> None:
        if event.before is not None:
            self._past.before(event.before)
        self._past.push(event.said)
        self._said, self._lost = event.said, ""
        self._show()

    @on(Lost)
    def _is_lost(self, event: Lost) -> None:
        self._lost = f"{event.why}; trying again"
        self._show()

    @on(Refused)
    def _was_refused(self, event: Refused) -> None:
        self.notify(event.why, severity="error", markup=False)

    def on_resize(self, _: Resize) -> None:
        self._show()

    def _show(self) -> None:
        said = self._said
        if said is None:
            self.query_one("#head", Static).update(Text(self._lost))
            return
        # The scroll bar is beside the lanes.
        width = max(1, self.size.width - 2)
        for name, text in {
            "head": view.head(said, self._lost), "bands": view.bands(said, self._past, width),
            "columns": view.columns(width), "ranks": view.lanes(said, self._past, width),
            "words": view.lately(said, WORDS), "fronts": view.front_ends(said),
        }.items():  # fmt: skip
            self.query_one(f"#{name}", Static).update(text)

    def action_propose(self, action: str) -> None:
        """Say what would happen, and do it where that is wanted."""
        if self._said is not None:
            modes = MODES if action == "pause" else ("resume",)
            self.push_screen(Proposal(action, modes, self._said), self._decided)

    def _decided(self, mode: str | None) -> None:
        if mode is not None:
            _in_background(lambda: self._do(mode))

    def _do(self, mode: str) -> None:
        try:
            if mode == "resume":
                self._control.resume()
            else:
                self._control.pause(mode)
        except ControlError as error:
            self.post_message(self.Refused(str(error)))


class Proposal(ModalScreen[str | None]):
    """Says what will happen, and asks. `modes`: the ways to do it, of which one is chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "yes", "Do it"), ("n,escape", "no", "Leave it"), ("m", "mode", "Another way"), ("q", "no", "Leave it"),
    ]  # fmt: skip

    def __init__(self, action: str, modes: tuple[str, ...], said: view.State) -> None:
        super().__init__()
        self._action, self._modes, self._said = action, modes, said
        self._chosen = 0

    @property
    def _mode(self) -> str:
        return self._modes[self._chosen]

    def compose(self) -> ComposeResult:
        yield Static(self._text(), id="proposal")

    def _text(self) -> Text:
        several = len(self._modes) > 1
        way = f" ({self._mode})" if several else ""
        keys = "y: do it   n: leave it" + ("   m: another way" if several else "")
        then = view.what_happens(self._mode, self._said)
        return Text.assemble((f"{self._action.capitalize()} the deployment{way}", "bold"), f"\n\n{then}\n\n{keys}")

    def action_yes(self) -> None:
        self.dismiss(self._mode)

    def action_no(self) -> None:
        self.dismiss(None)

    def action_mode(self) -> None:
        self._chosen = (self._chosen + 1) % len(self._modes)
        self.query_one("#proposal", Static).update(self._text())


def _in_background(work: Callable[[], None]) -> None:
    """A thread that nobody waits for: it may be reading what never comes."""
    threading.Thread(target=work, name="deployment", daemon=True).start()
