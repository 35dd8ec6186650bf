"""Bodies that are arrays or tables: what they mean, and that no bytes of a client do harm."""

import contextlib
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.errors import InputError
from serving.app import ENDPOINTS
from serving.arrays import npy, table
from serving.corrosion import Corrosion
from serving.corrosion_bodies import EXAMPLE_HOURS, UNITS, example_site
from serving.endpoint import ARROW, NPY
from serving.hawq import Classify
from serving.payloads import Unsupported, read
from serving.send import Score
from serving.spectrum import Spectrum

MATRIX = np.arange(12.0).reshape(3, 4)


def npy_bytes(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def image_file(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def arrow_bytes(content: pa.Table, compression: str | None = None) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, content.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(content)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "u1", "<i4", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_as_numpy_wrote_them(dtype, order):
    array = np.asarray(MATRIX.astype(dtype), order=order)
    found = npy(npy_bytes(array))
    assert found.dtype == array.dtype.newbyteorder("=")
    assert (found == array).all()
    for version in ((1, 0), (2, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=version)
        assert (npy(file.getvalue()) == array).all()


def claiming(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """A file whose header claims a shape, without any content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not a NumPy file"),
        (b"\x93NUMPY\x01\x00", "not a NumPy file"),
        (b"PK\x03\x04 an archive", "not a NumPy file"),
        (npy_bytes(np.array([{"a": 1}, None], dtype=object), allow_pickle=True), "an array of numbers is needed"),
        (npy_bytes(np.array(["a", "b"])), "an array of numbers is needed"),
        (npy_bytes(np.zeros(2, [("a", "f4"), ("b", "i4")])), "an array of numbers is needed"),
        (npy_bytes(MATRIX)[:-1], "the array needs 96 bytes, 95 are there"),
        (npy_bytes(MATRIX) + b"!", "the array needs 96 bytes, 97 are there"),
        (claiming((1 << 40, 1 << 40)), "the array needs 9671406556917033397649408 bytes, 0 are there"),
        (claiming((-1, -8)), "its shape is"),
        (claiming((10**4000, 10**4000)), "its shape is"),  # more digits than Python writes
        (claiming((10**18,) * 400), "its shape is"),
        (npy_bytes(np.zeros((0, 3))), "the array is empty"),
    ],
)
def test_what_is_no_array_of_numbers_is_told_so_before_anything_is_allocated(content, line):
    with pytest.raises(InputError, match=line):
        npy(content)


def test_tables_come_as_arrow_wrote_them():
    content = pa.table({"a": [1.5, 2.5], "b": [1, 2], "c": ["x", "y"], "d": [b"1", b"2"]})
    assert table(arrow_bytes(content)).equals(content)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not a whole Arrow IPC stream"),
        (b"ARROW1", "not a whole Arrow IPC stream"),
        (arrow_bytes(pa.table({"a": [1.5] * 100}))[:-100], "not a whole Arrow IPC stream"),
        (arrow_bytes(pa.table({"a": np.zeros(1 << 20)}), "zstd"), "without compression"),
        (arrow_bytes(pa.table({"a": np.zeros(1 << 20)}), "lz4"), "without compression"),
        (
            arrow_bytes(pa.table({"a": pa.array(["x", "y"]).dictionary_encode()})),
            "without compression and dictionaries",
        ),
        (arrow_bytes(pa.table({"a": pa.nulls(1 << 30)})), "column a is of null"),
        (arrow_bytes(pa.table({"a": [[1.0]]})), "column a is of list"),
        (arrow_bytes(pa.table({"a": pa.array([], pa.float64())})), "the table is empty"),
    ],
)
def test_what_is_no_plain_table_is_told_so(content, line):
    with pytest.raises(InputError, match=line):
        table(content)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["npy", "arrow"]), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4))
def test_no_flipped_byte_does_more_than_be_refused(kind, changes):
    content = bytearray(
        npy_bytes(MATRIX) if kind == "npy" else arrow_bytes(pa.table({"a": [1.0, 2.0], "b": ["x", "yz"]}))
    )
    for place, value in changes:
        content[place % len(content)] = value
    with contextlib.suppress(InputError):
        (npy if kind == "npy" else table)(bytes(content))


def test_a_body_of_another_type_is_not_read():
    for kind in (NPY, ARROW, "text/plain", "application/octet-stream", "x" * 1000):
        with pytest.raises(Unsupported, match=r"score takes no .* body; it takes application/json$"):
            read(Score, kind, {}, b"")
    with pytest.raises(Unsupported, match=r"it takes application/json, application/vnd\.apache\.arrow\.stream$"):
        read(Corrosion, NPY, {}, npy_bytes(MATRIX))


@pytest.mark.parametrize("kind", [None, "application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_read_whatever_it_is_called(kind):
    assert read(Score, kind, {}, b'{"text": "a"}').text == "a"


def test_a_matrix_is_the_same_however_it_comes():
    weight = np.random.default_rng(0).standard_normal((24, 16))
    columns = pa.table({str(i): column for i, column in enumerate(weight.T)})
    endpoint = Spectrum([], "v")
    query = {"method": "plain", "rule": "ks"}
    by_json = Spectrum.Request(matrix=weight.tolist(), **query)
    requests = [
        by_json,
        read(Spectrum, NPY, query, npy_bytes(weight)),
        read(Spectrum, ARROW, query, arrow_bytes(columns)),
    ]
    assert len({endpoint.cost(request) for request in requests}) == 1
    answers = endpoint.answer(requests)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("query", "content", "error", "line"),
    [
        ({"window": "x"}, npy_bytes(MATRIX), RequestValidationError, "window"),
        ({"layer": "a"}, npy_bytes(MATRIX), RequestValidationError, "give one of"),
        ({"colour": "1"}, npy_bytes(MATRIX), RequestValidationError, "colour"),
        ({}, npy_bytes(np.zeros(3)), InputError, "body: a matrix of float16"),
        ({}, npy_bytes(np.zeros((3, 3), int)), InputError, "body: a matrix of float16"),
    ],
)
def test_a_wrong_matrix_or_setting_is_told_so(query, content, error, line):
    with pytest.raises(error) as raised:
        read(Spectrum, NPY, query, content)
    assert line in str(raised.value.errors() if error is RequestValidationError else raised.value)


@pytest.mark.parametrize(
    ("column", "kind"), [(pa.array([0, 1], pa.timestamp("s")), "timestamp"), (pa.array([1, 2]), "int64")]
)
def test_a_matrix_of_a_table_is_of_floats(column, kind):
    with pytest.raises(InputError, match=f"body: column b is of {kind}.*halffloat, float, double"):
        read(Spectrum, ARROW, {}, arrow_bytes(pa.table({"a": [1.0, 2.0], "b": column})))


WRONG = 20_000


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("spectrum", {"matrix": [[""] * 100] * (WRONG // 100)}),
        ("spectrum", {"allocate": {"alphas": [""] * WRONG, "parameters": [""] * WRONG, "sparsity": 0.5}}),
        ("spectrum", {"hessian": {"network": {"weights": [[[""] * 10] * 100] * 20}, "inputs": [[""]] * WRONG}}),
        ("spectrum", {"hessian": {"network": {"weights": [[[1.0]]], "biases": [[]] * WRONG}, "targets": [""] * WRONG}}),
        ("classify", {"pixels": [[""] * 100] * (WRONG // 100)}),
        ("advise", {"traces": [""] * 2000, "ties": [[""] * 100] * 200, "latency": [[""] * 10] * (WRONG // 10)}),
        ("advise", {name: [""] * WRONG for name in ("errors", "n_params", "macs")}),
        ("corrosion", {"series": [{"time": [None] * WRONG, "inputs": {"wind": [""] * WRONG}}], "units": {}}),
        ("graph-anomaly", {"graphs": [{"kinds": [""] * WRONG, "edges": [[""]] * WRONG}] * 100}),
        ("graph-anomaly", {"graphs": [{"features": [[""] * 100] * 200, "edges": []}]}),
        ("graph-property", {"graphs": [{"nodes": [""] * 1000, "edges": [[""]] * WRONG, "edge_types": [""] * WRONG}]}),
        ("hallucination", {"embeddings": [[""] * 100] * (WRONG // 100)}),
        ("molecule", {"spectra": {"ir": {"y": [""] * WRONG, "x": [""] * WRONG}}}),
    ],
)
def test_a_list_is_refused_by_its_first_wrong_entry(name, body):
    with pytest.raises(RequestValidationError) as raised:
        read(ENDPOINTS[name], None, {}, json.dumps(body).encode())
    assert len(raised.value.errors()) < 30


def test_a_body_of_nothing_but_unknown_fields_is_told_how_many_they_are():
    with pytest.raises(InputError, match="body: 20000 fields are wrong"):
        read(Score, None, {}, json.dumps(dict.fromkeys(map(str, range(WRONG)))).encode())


def test_images_come_as_arrays_or_files():
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    for array, count in ((images[0], 1), (images, 2), (images[:, None], 2)):
        request = read(Classify, NPY, {"explain": "true"}, npy_bytes(array))
        assert (request.bulk.shape, request.count(), request.explain) == ((count, 1, 5, 4), count, True)
    files = [image_file(Image.new("L", size)) for size in ((3, 5), (7, 2))]
    request = read(Classify, ARROW, {}, arrow_bytes(pa.table({"image": pa.array(files, pa.binary())})))
    assert (request.bulk, request.decoded()) == (files, 3 * 5 + 7 * 2)
    with pytest.raises(InputError, match="body: 65 image files; at most 64 are allowed"):
        read(Classify, ARROW, {}, arrow_bytes(pa.table({"image": pa.array(files[:1] * 65, pa.binary())})))
    for content in (np.zeros(3, np.uint8), np.zeros((2, 2))):
        with pytest.raises(InputError, match="body: uint8 of 2 to 4 dimensions"):
            read(Classify, NPY, {}, npy_bytes(content))
    with pytest.raises(InputError, match="one column `image` of binary files"):
        read(Classify, ARROW, {}, arrow_bytes(pa.table({"image": ["text"]})))


def test_weather_comes_as_a_table():
    site = example_site(EXAMPLE_HOURS)
    query = {"units": str(UNITS).replace("'", '"'), "horizon": "12"}
    wanted = Corrosion.Request(series=[site], units=UNITS, horizon=12)
    columns = {"time": site["time"], **site["inputs"]}
    assert read(Corrosion, ARROW, query, arrow_bytes(pa.table(columns))) == wanted
    stamps = pa.array(np.array([time[:19] for time in site["time"]], "datetime64[ns]"))
    found = read(Corrosion, ARROW, query, arrow_bytes(pa.table(columns | {"time": stamps})))
    assert found.series[0].inputs == wanted.series[0].inputs
    assert [time[:19] for time in found.series[0].time] == [time[:19] for time in site["time"]]
    zoned = pa.array(stamps.cast(pa.int64()), pa.timestamp("ns", "Mars/Base"))  # a zone that nobody here knows
    moments = read(Corrosion, ARROW, query, arrow_bytes(pa.table(columns | {"time": zoned}))).series[0].time
    assert [time[:19] for time in moments] == [time[:19] for time in site["time"]]
    two = {name: [value for value in column for _ in range(2)] for name, column in columns.items()}
    both = read(Corrosion, ARROW, query, arrow_bytes(pa.table(two | {"site": ["a", "b"] * EXAMPLE_HOURS})))
    assert both.series == wanted.series * 2


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"temperature": [1.0]}, "one column `time`"),
        ({"time": [None, 2.0], "temperature": [1.0, 2.0]}, "column time has missing entries"),
        ({"time": [1.0], "temperature": ["hot"]}, "column temperature is of string; inputs are numbers"),
        ({"time": pa.array([2**62], pa.timestamp("s")), "temperature": [1.0]}, "out of the range of dates"),
        (
            {"time": pa.array([2**62], pa.timestamp("s", "Mars/Base")), "temperature": [1.0]},
            "out of the range of dates",
        ),
        ({"time": np.arange(30_000.0), "temperature": np.arange(30_000.0)}, "30000 rows; at most 20000"),
    ],
)
def test_a_wrong_table_of_weather_is_told_so(columns, line):
    with pytest.raises(InputError, match=line):
        read(Corrosion, ARROW, {"units": "{}"}, arrow_bytes(pa.table(columns)))


def test_the_compression_of_a_batch_is_seen_whatever_stands_around_it():
    for rows in (1, 1000):
        for compression in (None, "zstd", "lz4"):
            content = arrow_bytes(pa.table({"a": np.zeros(rows), "b": ["x"] * rows}), compression)
            if compression is None:
                assert table(content).num_rows == rows
            else:
                with pytest.raises(InputError, match="without compression"):
                    table(content)
