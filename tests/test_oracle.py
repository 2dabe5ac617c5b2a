"The oracle: the least possible error on the simulated hub, and how far a model is from it."

import numpy as np
import pandas as pd
import pytest

from amhs.core import InputError, ParameterError
from amhs.evaluate import class_scores, level_scores
from amhs.oracle import Futures, attained_shares, kept_futures, look_ahead, oracle_forecast, sample_minutes
from amhs.simulate import SCENARIOS, simulate
from amhs.targets import build_targets

DAYS, SEED = 3, 5


@pytest.fixture(scope="module")
def world():
    telemetry = simulate(DAYS, SEED).telemetry
    targets = build_targets(telemetry)
    return telemetry, targets, look_ahead(sample_minutes(targets.index, 60), DAYS, SEED, n=80)


def test_what_then_happened_is_a_future_like_the_others(world):
    "The rank of the truth among the futures is uniform, or the fork is not the same hub."
    _, targets, futures = world
    truth = targets.loc[futures.rows]
    ranks = np.array([(futures.changes(t, h) < truth[f"change_{t}_{h}"].to_numpy()[:, None]).mean(axis=1) for t in ("min", "avg", "max") for h in (10, 15, 25)])
    assert 0.35 < ranks.mean() < 0.65
    assert (ranks < 0.02).mean() < 0.12 and (ranks > 0.98).mean() < 0.12


def test_nobody_beats_it(world):
    "On what really happened, too, its error is far below persistence's."
    _, targets, futures = world
    oracle = oracle_forecast(futures)
    still = oracle.assign(**{c: 0.0 for c in oracle if c.startswith("change")})
    mae = [level_scores(f, targets, n_draws=2).query("metric == 'mae'").set_index(["horizon_min", "target"])["value"] for f in (oracle, still)]
    assert (mae[0] < 0.7 * mae[1]).all()
    assert class_scores(oracle, targets, n_draws=2).query("metric == 'log_loss' and horizon_min == 10")["value"].iloc[0] < 0.8


def test_error_shrinks_to_the_oracles_and_never_below(world):
    "The less noise on the median, the nearer to all that is possible."
    _, _, futures = world
    oracle = oracle_forecast(futures)
    noise = np.random.default_rng(0).normal(size=len(oracle))
    worse = {f"{s}": oracle.assign(**{c: oracle[c] + s * noise for c in oracle if c.startswith("change")}) for s in (1, 5, 20)}
    shares = attained_shares(worse, futures, n_draws=50).pivot(index="model", columns=["horizon_min", "target"], values="attained")
    assert (shares.loc["1"] > shares.loc["5"]).all() and (shares.loc["5"] > shares.loc["20"]).all()
    assert (shares.loc["1"] <= 1.03).all(), "the median of all eighty futures has seen those it is judged on, the oracle's has not: a hundredth or two"
    assert (shares.loc["persistence"] == 0).all() and (shares.loc["oracle"] == 1).all()


def test_an_interval_holds_its_value(world):
    _, _, futures = world
    table = attained_shares({"half": oracle_forecast(futures) * np.float32(0.5)}, futures, n_draws=100).query("model == 'half'")
    assert ((table["low"] <= table["attained"]) & (table["attained"] <= table["high"]) & (table["low"] < table["high"])).all()


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not SCENARIOS[s].sensors])
def test_it_sees_the_present_of_every_scenario(scenario):
    "Also right after a scenario has changed the hub's numbers half-way."
    telemetry = simulate(0.5, 2, scenario).telemetry.set_index(["line", "timestamp"])
    rows = telemetry.index[[100, 359, 360, 361, 600]]
    futures = look_ahead(rows, 0.5, 2, scenario, n=4)
    assert (futures.now == telemetry.loc[rows, "hub_jobs"]).all()
    assert np.abs(futures.jobs[:, :, 0] - futures.now[:, None]).max() < 30


def test_kept_answers_are_those_of_the_question(world, tmp_path):
    telemetry, targets, _ = world
    rows = targets.index[[50, 900]]
    first = kept_futures(tmp_path, rows, DAYS, SEED, n=10)
    assert (kept_futures(tmp_path, rows, DAYS, SEED, n=10).jobs == first.jobs).all()
    other = kept_futures(tmp_path, rows, DAYS, SEED, n=12)
    assert other.jobs.shape[1] == 12 and len(list(tmp_path.glob("*.npz"))) == 2
    assert (other.jobs[0, 0] != other.jobs[0, 1]).any()


def test_mistakes_are_told(world):
    _, targets, futures = world
    two = targets.index[[5]].append(pd.MultiIndex.from_tuples([("HUB2", targets.index[9][1])], names=targets.index.names))
    with pytest.raises(ParameterError, match="one line"):
        look_ahead(two, DAYS, SEED)
    with pytest.raises(ParameterError, match="not in the simulation"):
        look_ahead(targets.index[[5]], days=DAYS, seed=SEED, start="2027-01-01")
    with pytest.raises(InputError, match="oracle's minutes"):
        attained_shares({"few": oracle_forecast(futures).iloc[:5]}, futures)


def test_slices_are_what_their_rows_say(world):
    "A slice's numbers are those of its rows asked about alone; the slices of a division weigh up to the whole."
    _, _, futures = world
    half, high = oracle_forecast(futures) * np.float32(0.5), futures.now > np.median(futures.now)
    parts = pd.DataFrame({"load": np.where(high, "high", "low")}, futures.rows)
    table = attained_shares({"half": half}, futures, parts, n_draws=20)
    alone = attained_shares({"half": half[high]}, Futures(futures.rows[high], futures.now[high], futures.jobs[high]), n_draws=20)
    of_high = table.query("slice == 'load' and part == 'high'")
    pd.testing.assert_frame_equal(of_high.drop(columns=["slice", "part"]).reset_index(drop=True), alone.drop(columns=["slice", "part"]))
    assert (table["mae_low"] <= table["mae"]).all() and (table["mae"] <= table["mae_high"]).all()
    sums = table.assign(total=table["mae"] * table["n"]).groupby(["slice", "horizon_min", "target", "model"])["total"].sum()
    assert np.allclose(sums["all"], sums["load"])


def test_by_hand():
    "Two minutes, four futures each."
    rows = pd.MultiIndex.from_product([["L"], pd.date_range("2026-01-01", periods=2, freq="30D", tz="UTC")], names=["line", "timestamp"])
    jobs = np.zeros((2, 4, 25), "float32") + np.array([12, 12, 16, 16], "float32")[:, None]
    table = attained_shares({"ten": pd.DataFrame({f"change_{t}_{h}": [4.0, 4.0] for t in ("min", "avg", "max") for h in (10, 15, 25)}, rows)},
                            Futures(rows, np.array([10, 10], "float32"), jobs), n_draws=5)
    mae = table.query("horizon_min == 10 and target == 'max'").set_index("model")["mae"]
    assert mae["persistence"] == 4 and mae["ten"] == 2 and mae["oracle"] == 2
    assert table.query("model == 'ten'")["attained"].eq(1).all()
