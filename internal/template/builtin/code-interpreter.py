"""The server of the template code-interpreter: runs code in Jupyter kernels.

It listens on port 49999 and speaks what @e2b/code-interpreter speaks: contexts, each a
kernel of its own that keeps its state, and /execute, which streams what comes of a piece of
code as one JSON object a line. One piece at a time runs in a context; others wait. When the
caller goes away what he asked for is interrupted. Nothing here decides who may call: the
sandbox's proxy does.
"""

import asyncio
import collections
import datetime
import getpass
import json
import os
import queue
import signal
import tempfile
import uuid

import tornado.httpclient
import tornado.httpserver
import tornado.iostream
import tornado.web
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

PORT = 49999
AGENT = "http://localhost:49983"
HOME = os.path.expanduser("~")
KEEPALIVE = 5.0  # seconds without output until a sign of life; clients give up after 60
READY = 60.0  # seconds for a kernel to start
MAX_BODY = 64 << 20  # bytes of a request
MAX_PENDING = 32 << 20  # bytes of output that a slow reader may leave here
LOOK = 0.25  # seconds between looks at whether what runs is still wanted
STUBBORN = 2.0  # seconds between interrupts of code that goes on

# What the SDK calls the parts of a result.
FORMATS = {
    "text/plain": "text", "text/html": "html", "text/markdown": "markdown", "image/svg+xml": "svg",
    "image/png": "png", "image/jpeg": "jpeg", "application/pdf": "pdf", "text/latex": "latex",
    "application/json": "json", "application/javascript": "javascript",
    "application/vnd.cay.data+json": "data", "application/vnd.cay.chart+json": "chart",
}

ALIASES = {"js": "javascript", "ts": "typescript", "python3": "python", "sh": "bash"}


class Refused(Exception):
    """A request that is answered with a status and a text."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status, self.text = status, text


def kernel_for(language):
    """The language's usual name and its Jupyter kernel."""
    language = ALIASES.get(language.lower(), language.lower())
    manager = KernelSpecManager()
    known = {}
    for name in manager.find_kernel_specs():
        known.setdefault(ALIASES.get(manager.get_kernel_spec(name).language.lower(), manager.get_kernel_spec(name).language.lower()), name)
    if language not in known:
        raise Refused(400, "there is no Jupyter kernel for the language %r in this sandbox; there are: %s" % (language, ", ".join(sorted(known))))
    return language, known[language]


class Context:
    """A kernel, its language and its working directory."""

    def __init__(self, language, kernel, cwd):
        self.id, self.language, self.kernel, self.cwd = str(uuid.uuid4()), language, kernel, cwd
        self.lock = asyncio.Lock()  # held by who runs something
        self.life = 0  # counts up with every restart
        self.reading = False  # somebody is at the sockets of this life
        self.changing = asyncio.Lock()  # held by who restarts or removes it
        self.env = {}  # what was given to it last
        self.manager = self.client = None

    def shown(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def start(self):
        # Unix sockets: no port of the sandbox is taken, and nobody outside can connect.
        sockets = tempfile.mkdtemp(prefix="kernel-")
        self.manager = AsyncKernelManager(kernel_name=self.kernel, transport="ipc", ip=os.path.join(sockets, "s"),
                                          connection_file=os.path.join(sockets, "connection.json"))
        # Its debugger warns of frozen modules on each start, and nobody debugs.
        await self.manager.start_kernel(cwd=self.cwd, env=dict(os.environ, PYDEVD_DISABLE_FILE_VALIDATION="1"))
        await self.meet()

    async def meet(self):
        self.client = self.manager.client()
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=READY)
        self.env = {}
        if self.language == "python":
            await self.quietly(SETUP)

    async def quietly(self, code):
        """Runs code of ours, which leaves no trace."""
        me = self.client.execute(code, silent=True, store_history=False, allow_stdin=False)
        while True:
            reply = await self.client.get_shell_msg(timeout=READY)
            if reply["parent_header"].get("msg_id") == me:
                break
        if reply["content"].get("status") == "error":
            raise RuntimeError("setting up the kernel: %s" % reply["content"].get("evalue"))

    async def restart(self):
        async with self.changing:
            await self.leave()
            await self.manager.restart_kernel(now=True)
            await self.meet()

    async def stop(self):
        async with self.changing:
            await self.leave()
            await self.manager.shutdown_kernel(now=True)

    async def leave(self):
        """Ends a life. Who reads sees that and goes, before the sockets are closed; those of the next
        life have the same names, and the kernel would not tell them apart."""
        self.life += 1
        while self.reading:
            await asyncio.sleep(LOOK / 10)
        self.client.stop_channels()


class Contexts:
    """All contexts, and the default one of each language, which is made when it is first asked for."""

    def __init__(self):
        self.all, self.defaults, self.making = {}, {}, asyncio.Lock()

    async def make(self, language, cwd):
        language, kernel = kernel_for(language)
        if not os.path.isabs(cwd) or not os.path.isdir(cwd):
            raise Refused(400, "cwd %r is no directory of this sandbox" % cwd)
        if not os.access(cwd, os.R_OK | os.X_OK):
            raise Refused(400, "cwd %r cannot be entered by the user %s, whom kernels run as" % (cwd, getpass.getuser()))
        context = Context(language, kernel, cwd)
        try:
            await context.start()
        except Exception:
            if context.manager is not None:
                await context.manager.shutdown_kernel(now=True)
            raise
        self.all[context.id] = context
        return context

    async def default(self, language):
        language, _ = kernel_for(language)
        async with self.making:
            context = self.all.get(self.defaults.get(language))
            if context is None:
                context = await self.make(language, HOME if os.path.isdir(HOME) else "/")
                self.defaults[language] = context.id
        return context

    def get(self, which):
        if which not in self.all:
            raise Refused(404, "Context %s not found" % which)
        return self.all[which]

    async def remove(self, which):
        context = self.get(which)
        del self.all[which]
        await context.stop()


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")


def result_of(content, main):
    """A display of the kernel as the SDK knows it."""
    out = {"type": "result", "is_main_result": main}
    for mime, value in content["data"].items():
        name = FORMATS.get(mime)
        if name is None:
            out.setdefault("extra", {})[mime] = value
            continue
        if isinstance(value, list):
            value = "".join(value)
        if name == "text" and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        out[name] = value.replace("\n", "") if name in ("png", "jpeg", "pdf") else value
    return out


class Run:
    """One execution, from its first line to its last."""

    def __init__(self, context):
        self.context, self.life = context, None
        self.lines, self.pending, self.more = collections.deque(), 0, asyncio.Event()
        self.gone = False  # nobody reads any more
        self.over = False

    def say(self, **line):
        if self.gone:
            return
        data = json.dumps(line) + "\n"
        self.lines.append(data)
        self.pending += len(data)
        self.more.set()

    async def do(self, code, before):
        """Runs the code, and before what has to be done before."""
        async with self.context.changing:
            self.life, self.context.reading = self.context.life, True
        try:
            await before()
            died = await self.read(code)
        finally:
            self.context.reading = False
        if died:
            self.say(type="error", name="KernelDied", value="the kernel ended, perhaps for lack of memory; its context was restarted", traceback="")
            await self.context.restart()

    async def read(self, code):
        """Reads what comes of the code to its end; true when the kernel ended."""
        client = self.context.client
        me = client.execute(code, store_history=True, allow_stdin=False)
        asked = 0.0
        loop = asyncio.get_running_loop()
        while True:
            if (self.gone or self.pending > MAX_PENDING) and loop.time() - asked > STUBBORN:
                asked = loop.time()
                if not self.gone:
                    self.say(type="error", name="OutputError", value="more than %d MiB of output were not read" % (MAX_PENDING >> 20), traceback="")
                    self.gone = True
                await self.context.manager.interrupt_kernel()
            try:
                message = await client.get_iopub_msg(timeout=LOOK)  # not cancelled from outside, which could lose one
            except queue.Empty:
                message = None
            if self.life != self.context.life:
                self.say(type="error", name="ContextRestarted", value="the context was restarted or removed", traceback="")
                return False
            if message is None:
                if not await self.context.manager.is_alive():
                    return True
                continue
            if message["parent_header"].get("msg_id") != me:
                continue
            if self.take(message["msg_type"], message["content"]):
                return False

    def take(self, kind, content):
        """One message of the kernel; true for the last."""
        if kind == "stream":
            self.say(type=content["name"], text=content["text"], timestamp=now())
        elif kind == "execute_input":
            self.say(type="number_of_executions", execution_count=content["execution_count"])
        elif kind in ("display_data", "execute_result"):
            self.say(**result_of(content, kind == "execute_result"))
        elif kind == "error":
            self.say(type="error", name=content["ename"], value=content["evalue"], traceback="\n".join(content["traceback"]))
        return kind == "status" and content["execution_state"] == "idle"


class Handler(tornado.web.RequestHandler):
    """What all requests have in common."""

    @property
    def contexts(self):
        return self.application.settings["contexts"]

    def body(self, **types):
        """The fields of a JSON body, None where they are absent."""
        try:
            body = json.loads(self.request.body or b"{}")
        except ValueError:
            raise Refused(400, "the body must be a JSON object") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        for name, kind in types.items():
            if body.get(name) is not None and not isinstance(body[name], kind):
                raise Refused(400, "%s must be of type %s" % (name, kind.__name__))
        return [body.get(name) for name in types]

    def reply(self, value, status=200):
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value))

    def write_error(self, status_code, **kwargs):
        error = kwargs.get("exc_info", (None, None, None))[1]
        text = self._reason
        if isinstance(error, Refused):
            status_code, text = error.status, error.text
        self.set_status(status_code)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(text)

    def log_exception(self, typ, value, tb):
        if not isinstance(value, (Refused, tornado.iostream.StreamClosedError)):
            super().log_exception(typ, value, tb)


class Health(Handler):
    def get(self):
        self.finish("OK")


class All(Handler):
    def get(self):
        self.reply([c.shown() for c in self.contexts.all.values()])

    async def post(self):
        language, cwd = self.body(language=str, cwd=str)
        context = await self.contexts.make(language or "python", cwd or HOME)
        self.reply(context.shown())


class One(Handler):
    def get(self, which):
        self.reply(self.contexts.get(which).shown())

    async def delete(self, which):
        await self.contexts.remove(which)
        self.finish()


class Restart(Handler):
    async def post(self, which):
        await self.contexts.get(which).restart()
        self.reply(None)


class Execute(Handler):
    run = None

    def on_connection_close(self):
        if self.run is not None:
            self.run.gone = True
            self.run.more.set()

    async def post(self):
        code, which, language, env = self.body(code=str, context_id=str, language=str, env_vars=dict)
        if code is None:
            raise Refused(400, "code is missing")
        if which and language:
            raise Refused(400, "only one of context_id and language can be given")
        if env and not all(isinstance(v, str) for v in env.values()):
            raise Refused(400, "env_vars must hold texts")
        context = self.contexts.get(which) if which else await self.contexts.default(language or "python")
        if env and context.language != "python":
            raise Refused(400, "env_vars are for python; this context is %s" % context.language)
        self.run = Run(context)
        self.set_header("Content-Type", "application/x-ndjson")
        work = asyncio.create_task(self.work(context, code, env or {}))
        try:
            await self.send(work)
        except tornado.iostream.StreamClosedError:
            self.on_connection_close()
        await work

    async def work(self, context, code, env):
        """Runs the code in its turn."""
        run = self.run
        try:
            async with context.lock:
                if run.gone:
                    return
                if context.id not in self.contexts.all:
                    run.say(type="error", name="ContextRestarted", value="the context was removed", traceback="")
                    return
                await run.do(code, lambda: self.environment(context, env))
        except Exception as error:  # of the kernel's, which must not leave the reader waiting
            run.say(type="error", name=type(error).__name__, value=str(error), traceback="")
        finally:
            run.say(type="end_of_execution")
            run.over = True
            run.more.set()

    async def environment(self, context, env):
        """Gives the kernel the sandbox's variables, as they are now, and those of this execution alone."""
        if context.language != "python":
            return
        wanted = dict(await sandbox_env(self.request.headers.get("X-Access-Token")))
        wanted.update(env)
        if wanted != context.env:
            await context.quietly("__cay__.environment(%r)" % wanted)
            context.env = wanted

    async def send(self, work):
        """Writes lines as they come, with a sign of life when none do."""
        run = self.run
        while True:
            run.more.clear()
            while run.lines:
                line = run.lines.popleft()
                run.pending -= len(line)
                self.write(line)
                await self.flush()
            if run.over or run.gone and work.done():
                return
            try:
                await asyncio.wait_for(run.more.wait(), KEEPALIVE)
            except asyncio.TimeoutError:
                self.write(json.dumps({"type": "keepalive"}) + "\n")
                await self.flush()
            if run.gone:
                return


async def sandbox_env(token):
    """The variables of the sandbox, of which its agent tells who has its token."""
    if not token:
        return {}
    request = tornado.httpclient.HTTPRequest(AGENT + "/envs", headers={"X-Access-Token": token}, request_timeout=5)
    try:
        reply = await tornado.httpclient.AsyncHTTPClient().fetch(request)
        env = json.loads(reply.body) or {}
    except (OSError, ValueError, tornado.httpclient.HTTPError):
        return {}  # another's token: the code runs with what the server was started with
    return env if isinstance(env, dict) else {}


# What runs first in each Python kernel, in a name space of its own.
SETUP = r'''
def __cay__():
    import math, os, re
    from IPython import get_ipython
    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

    def plain(v):
        """Returns v as JSON has it: numbers and texts as they are, times in ISO format."""
        if hasattr(v, "item"):
            v = v.item()
        if hasattr(v, "isoformat"):
            return v.isoformat()
        if isinstance(v, float) and not math.isfinite(v):
            return None
        return v if v is None or isinstance(v, (bool, int, float, str)) else str(v)

    def data_of(frame):
        return {str(name): [plain(v) for v in frame[name].tolist()] for name in frame.columns}

    def points_of(line):
        return [[plain(x), plain(y)] for x, y in zip(line.get_xdata(orig=True), line.get_ydata(orig=True))]

    def unit_of(label):
        """Returns the unit that a label ends with in parentheses or brackets, or None."""
        found = re.search(r"\s\(([^()]+)\)\s*$|\[([^\[\]]+)\]\s*$", label)
        return (found.group(1) or found.group(2)) if found else None

    def labels(axes):
        x, y = axes.get_xlabel(), axes.get_ylabel()
        return {"x_label": x or None, "y_label": y or None, "x_unit": unit_of(x), "y_unit": unit_of(y)}

    def converter_of(axis):
        """Returns the name of the class that converts the values of an axis, "" for numbers."""
        # get_converter is matplotlib's name since 3.10, converter the one before.
        converter = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
        return type(converter).__name__ if converter is not None else ""

    def reader(axis):
        """Returns a function from a drawn position on an axis to the value it stands for."""
        from matplotlib.dates import num2date
        converter = converter_of(axis)
        if "Date" in converter:
            return lambda v: plain(num2date(v))
        if "Category" in converter:
            names = {place: name for name, place in axis.units._mapping.items()}
            return lambda v: names.get(round(float(v)), plain(v))
        return plain

    def scales(axes):
        from matplotlib.dates import num2date
        out = {}
        for n, axis, scale in (("x", axes.xaxis, axes.get_xscale()), ("y", axes.yaxis, axes.get_yscale())):
            converter, ticks = converter_of(axis), axis.get_ticklocs()
            if scale == "linear" and "Date" in converter:
                scale, ticks = "datetime", [num2date(t) for t in ticks]
            elif scale == "linear" and "Category" in converter:
                scale = "categorical"
            out[n + "_ticks"] = [plain(t) for t in ticks]
            out[n + "_tick_labels"] = [t.get_text() for t in axis.get_ticklabels()]
            out[n + "_scale"] = scale if scale in ("linear", "datetime", "categorical", "log", "symlog", "logit", "function", "functionlog", "asinh") else "linear"
        return out

    def rectangle(xs, ys):
        """Returns the left, right, bottom and top of a closed upright rectangle, or None."""
        xs, ys = [float(x) for x in xs], [float(y) for y in ys]
        if len(xs) < 5 or len(xs) > 6 or xs[0] != xs[4] or ys[0] != ys[4] or len(set(xs)) != 2 or len(set(ys)) != 2:
            return None
        return min(xs), max(xs), min(ys), max(ys)

    def rectangles(axes):
        """Returns the boxes of a box plot: closed lines, or filled paths as patch_artist draws them."""
        from matplotlib.patches import PathPatch
        drawn = [(l.get_xdata(orig=False), l.get_ydata(orig=False)) for l in axes.get_lines()]
        drawn += [p.get_path().vertices.T for p in axes.patches if type(p) is PathPatch]
        return [r for r in (rectangle(xs, ys) for xs, ys in drawn) if r]

    def box_of(rest, left, right, low, high):
        """Returns the statistics of one upright box, or None if its lines are drawn in another way."""
        middle = round((left + right) / 2, 6)
        ends, medians, single = [], [], []
        for xs, ys, style in rest:
            if not xs:
                continue
            if all(round(x, 6) == middle for x in xs):
                if style == "None":
                    single += ys
                elif len(ys) == 2:
                    ends += ys
            elif len(ys) == 2 and ys[0] == ys[1] and low <= ys[0] <= high and (min(xs), max(xs)) == (left, right):
                medians.append(ys[0])
        if not medians or not ends:
            return None
        return {"min": min(ends), "first_quartile": low, "median": medians[0], "third_quartile": high, "max": max(ends),
                "outliers": [y for y in single if y < min(ends) or y > max(ends)]}

    def boxes_of(axes, boxes, base):
        """Returns the chart of a plot of boxes, upright or lying, or None if it cannot be told."""
        drawn = [([float(x) for x in l.get_xdata(orig=False)], [float(y) for y in l.get_ydata(orig=False)], l.get_linestyle()) for l in axes.get_lines()]
        for axis, turn in ((axes.xaxis, False), (axes.yaxis, True)):  # lying boxes are read with their axes exchanged
            lines = [(*points[::-1 if turn else 1], style) for *points, style in drawn]
            ticks = {round(float(at), 6): t.get_text() for at, t in zip(axis.get_ticklocs(), axis.get_ticklabels())}
            elements = []
            for left, right, low, high in ((b[2:] + b[:2] if turn else b) for b in boxes):
                box = box_of(lines, left, right, low, high)
                at = round((left + right) / 2, 6)
                elements.append(box and dict(box, label=ticks.get(at) or str(at)))
            if all(elements):
                return dict(base, **labels(axes), type="box_and_whisker", elements=elements)
        return None  # a wrong value would be worse than none

    def chart_of(axes):
        """What a pair of axes shows, as far as it can be told from what is drawn."""
        from matplotlib.collections import PathCollection
        from matplotlib.container import BarContainer
        from matplotlib.patches import Wedge
        base = {"title": axes.get_title() or None}
        wedges = [p for p in axes.patches if isinstance(p, Wedge)]
        if wedges:
            return dict(base, type="pie", elements=[{"label": w.get_label(), "angle": round(plain(abs(w.theta2 - w.theta1)), 4), "radius": plain(w.r)} for w in wedges])
        bars = [c for c in axes.containers if isinstance(c, BarContainer)]
        if bars:
            ticks = {round(float(at), 6): t.get_text() for at, t in zip(axes.get_xticks(), axes.get_xticklabels())}
            elements = []
            for group in bars:
                upright = group.orientation != "horizontal"
                if not upright:
                    ticks = {round(float(at), 6): t.get_text() for at, t in zip(axes.get_yticks(), axes.get_yticklabels())}
                for bar in group.patches:
                    at = bar.get_x() + bar.get_width() / 2 if upright else bar.get_y() + bar.get_height() / 2
                    elements.append({"label": ticks.get(round(float(at), 6)) or str(plain(at)), "group": str(group.get_label()),
                                     "value": plain(bar.get_height() if upright else bar.get_width())})
            return dict(base, **labels(axes), type="bar", elements=elements)
        scatter = [c for c in axes.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
        if scatter:
            x_of, y_of = reader(axes.xaxis), reader(axes.yaxis)
            return dict(base, **labels(axes), **scales(axes), type="scatter", elements=[
                {"label": str(c.get_label()), "points": [[x_of(x), y_of(y)] for x, y in c.get_offsets()]} for c in scatter])
        boxes = rectangles(axes)
        if boxes:
            return boxes_of(axes, boxes, base)
        lines = [l for l in axes.get_lines() if len(l.get_xdata(orig=True))]
        if lines:
            return dict(base, **labels(axes), **scales(axes), type="line", elements=[
                {"label": str(l.get_label()), "points": points_of(l)} for l in lines])
        return None

    def figure_of(figure):
        charts = [c for c in (chart_of(a) for a in figure.axes) if c]
        if len(charts) > 1:
            title = figure._suptitle.get_text() if getattr(figure, "_suptitle", None) else None
            return {"type": "superchart", "title": title, "elements": charts}
        return charts[0] if charts else None

    def safely(f):
        def told(value):
            try:
                return f(value)
            except Exception:  # a display without this part is better than none
                return None
        return told

    class Data(BaseFormatter):
        format_type = Unicode("application/vnd.cay.data+json")
        print_method = ObjectName("_repr_cay_data_")
        _return_type = dict

    class Chart(BaseFormatter):
        format_type = Unicode("application/vnd.cay.chart+json")
        print_method = ObjectName("_repr_cay_chart_")
        _return_type = dict

        def pop(self, typ, default=None):
            return default  # matplotlib takes its figures away from every formatter before it gives them to its own

    display = get_ipython().display_formatter
    for formatter in (Data(parent=display), Chart(parent=display)):
        display.formatters[formatter.format_type] = formatter
    display.formatters["application/vnd.cay.data+json"].for_type_by_name("pandas.core.frame", "DataFrame", safely(data_of))
    display.formatters["application/vnd.cay.chart+json"].for_type_by_name("matplotlib.figure", "Figure", safely(figure_of))

    given = {}

    def environment(wanted):
        """Sets the variables, and gives those back that it has set before and that are not wanted any more."""
        for name, before in list(given.items()):
            if name not in wanted:
                del given[name]
                if before is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = before
        for name, value in wanted.items():
            if name not in given:
                given[name] = os.environ.get(name)
            os.environ[name] = value

    class Inside:
        pass

    inside = Inside()
    inside.environment = environment
    return inside

__cay__ = __cay__()
'''


async def main():
    contexts = Contexts()
    await contexts.default("python")  # it is ready when this answers
    routes = [
        (r"/health", Health), (r"/execute", Execute), (r"/contexts", All),
        (r"/contexts/([^/]+)/restart", Restart), (r"/contexts/([^/]+)", One),
    ]
    app = tornado.web.Application(routes, contexts=contexts, log_function=lambda handler: None)
    server = tornado.httpserver.HTTPServer(app, max_buffer_size=MAX_BODY)
    server.listen(PORT)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.stop()
    for which in list(contexts.all):
        await contexts.remove(which)


asyncio.run(main())
