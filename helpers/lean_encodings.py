"""In the place of the standard library's package `encodings`, for an interpreter that starts with UTF-8.

Every interpreter imports that package as it starts: to look UTF-8 up it lists two folders, loads three modules and
makes a table of three hundred names, a sixth of its start. This one knows UTF-8. Asked for anything else, it becomes
the real one. quicken.py puts it where one interpreter finds it first, and the standard library second.
"""

import codecs
import sys
from codecs import utf_8_decode, utf_8_encode

#: The real package's: its other modules are found at once
__path__ = [f"{sys.path[1]}/encodings"]


def _encoder(errors: str = "strict") -> codecs.IncrementalEncoder:
    encoder = codecs.IncrementalEncoder(errors)
    encoder.encode = lambda input, final=False: utf_8_encode(input, encoder.errors)[0]  # type: ignore[method-assign]
    return encoder


def _decoder(errors: str = "strict") -> codecs.IncrementalDecoder:
    decoder = codecs.BufferedIncrementalDecoder(errors)
    decoder._buffer_decode = utf_8_decode  # type: ignore[assignment]
    return decoder


def _writer(stream, errors="strict"):  # type: ignore[no-untyped-def]
    from encodings import utf_8

    return utf_8.StreamWriter(stream, errors)


def _reader(stream, errors="strict"):  # type: ignore[no-untyped-def]
    from encodings import utf_8

    return utf_8.StreamReader(stream, errors)


def _find(name: str) -> codecs.CodecInfo | None:
    if name in ("utf-8", "utf_8", "utf8"):
        return codecs.CodecInfo(utf_8_encode, utf_8_decode, _reader, _writer, _encoder, _decoder, "utf-8")
    found: codecs.CodecInfo | None = _real("search_function")(name)
    return found


def _real(name: str):  # type: ignore[no-untyped-def]
    """Return what the real package has under `name`; what it has, this one has from now on."""
    if "__getattr__" in globals():
        from importlib.machinery import SourceFileLoader

        code = SourceFileLoader(__name__, f"{__path__[0]}/__init__.py").get_code(__name__)
        del globals()["__getattr__"]  # it is asked for "aliases" on the way
        try:
            exec(code, globals())
        except BaseException:
            globals()["__getattr__"] = _real
            raise
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


__getattr__ = _real
codecs.register(_find)
