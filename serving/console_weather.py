"""The tab of corrosion: the weather of a place, how fast metal corrodes under it, and what is to come."""

from datetime import UTC, datetime, timedelta
from typing import Any

from library.qrc.weather import CHANNELS, load_weather
from serving.console_calls import Endpoints
from serving.console_figures import forecast_figure, weather_figure
from serving.console_page import answering, drawn, figures, introduction, number, paragraph, share, tiles, waiting
from serving.corrosion_bodies import UNITS

AIRPORTS = {"Newark": "EWR", "LaGuardia": "LGA", "Kennedy": "JFK"}
SEEN = 336  # hours of weather that the endpoint sees: reservoirs forget their start within them
SHOWN = 96  # of them in figures
FIRST_DAY, LAST_DAY = 16, 355  # that have SEEN hours before them, from 06:00 on 1 January, and enough after them
LEVEL = 0.8


def weather_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    gr.HTML(
        introduction(
            "How fast does it corrode?",
            f"The endpoint sees {SEEN // 24} days of weather at a New York airport in 2013, and as a weather forecast "
            "what followed.",
        )
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            place = gr.Radio(list(AIRPORTS), value="Kennedy", label="Airport", elem_id="airport")
        with gr.Column(scale=1, min_width=280):
            day = gr.Slider(FIRST_DAY, LAST_DAY, 128, step=1, label="Day of the year", elem_id="day")
        with gr.Column(scale=1, min_width=280):
            horizon = gr.Slider(6, 96, 48, step=6, label="Hours to forecast", elem_id="horizon")
    button = gr.Button("Forecast", variant="primary", elem_id="ask-corrosion")
    answer = gr.HTML(waiting("Forecast, and the weather, rate and loss appear here."), elem_id="corrosion")

    @answering
    def forecast(place: str, day: float, horizon: float) -> str:
        body, times = request(AIRPORTS[place], int(day), int(horizon))
        return _forecast(endpoints.ask("corrosion", body), body, times)

    button.click(forecast, [place, day, horizon], answer, queue=False, api_visibility="private")


def request(station: str, day: int, horizon: int) -> tuple[dict[str, Any], list[datetime]]:
    """The body for the hours before a day's beginning and `horizon` hours after it, and the times of all its rows."""
    year = load_weather(station)
    offset = round((datetime(2013, 1, 1, tzinfo=UTC) - year.start).total_seconds() / 3600)
    now = min(max(24 * (day - 1) + offset, SEEN), year.hours - horizon)
    times = [year.start + timedelta(hours=now - SEEN + i) for i in range(SEEN + horizon)]
    rows = {name: getattr(year, name)[now - SEEN : now + horizon].tolist() for name in CHANNELS}

    def site(begin: int, end: int) -> dict[str, Any]:
        return {
            "time": [time.isoformat() for time in times[begin:end]],
            "inputs": {name: values[begin:end] for name, values in rows.items()},
        }

    body = {
        "series": [site(0, SEEN)],
        "future": [site(SEEN, SEEN + horizon)],
        "units": UNITS,
        "horizon": horizon,
        "level": LEVEL,
        "explain": True,
    }
    return body, times


def _forecast(answer: dict[str, Any], body: dict[str, Any], times: list[datetime]) -> str:
    found = answer["results"][0]
    ahead = [curve | {"unit": curve["unit"].replace("m2", "m²")} for curve in found["forecast"]]
    seen = {curve["name"]: _last(curve) for curve in found["nowcast"]}
    first = SEEN - SHOWN
    columns = {name: body["series"][0]["inputs"][name][first:] + body["future"][0]["inputs"][name] for name in CHANNELS}
    shown = [
        (
            curve["name"],
            f"{number(curve['mean'][-1])} {curve['unit']}",
            f"{number(curve['lower'][-1])} to {number(curve['upper'][-1])}"
            + (f", since {times[0]:%d %B}" if curve["name"] == "loss" else ""),
        )
        for curve in ahead
    ]
    pictures = [
        drawn(
            forecast_figure(times[first:SEEN], seen.get(curve["name"]), times[SEEN:], curve),
            f"{curve['name'].capitalize()} with an interval that should hold {share(LEVEL)} of the outcomes.",
        )
        for curve in ahead
    ]
    return (
        paragraph(f"At the end of the forecast, {times[-1]:%d %B %Y, %H:%M} UTC:")
        + tiles(*shown)
        + (
            paragraph("The model has learned from simulated corrosion under measured weather.")
            if answer["simulated"]
            else ""
        )
        + "".join(paragraph(warning, quiet=True) for warning in found["warnings"])
        + figures(
            *pictures,
            drawn(
                weather_figure(times[first:], columns, SHOWN),
                "The weather; beyond the dotted line it counts as a forecast.",
            ),
        )
    )


def _last(curve: dict[str, Any]) -> dict[str, Any]:
    """The part of a curve that is shown."""
    return curve | {end: curve[end][-SHOWN:] for end in ("mean", "lower", "upper")}
