// What a token's colour says: a measure, mapped to ten steps of strength.

export const LEVELS = 10;
export const MISSING = 255;

const MEASURES = {
  overlap: {
    label: "overlap", low: "1", high: "0", unit: "share of the first k in common",
    values: (rollout, now) => now.overlaps, strength: (v) => 1 - v,
    absent: "the student's top-K is not known: send candidate ids",
  },
  logprob: {
    label: "teacher log-prob", low: "0", high: "\u2264 \u22126", unit: "nats",
    values: (rollout) => rollout.logprobs, strength: (v) => -v / 6, absent: "",
  },
  kl: {
    label: "KL", low: "0", high: "\u2265 2", unit: "nats, student to teacher",
    values: (rollout) => rollout.kl, strength: (v) => v / 2,
    absent: "only recorded rollouts say it",
  },
  weight: {
    label: "weight", low: "0", high: "max", unit: "of the token's loss",
    values: (rollout) => rollout.weight, strength: (v, max) => (max > 0 ? v / max : 0),
    absent: "only recorded rollouts say it",
  },
};
export const NAMES = Object.keys(MEASURES);
export const measure = (name) => MEASURES[name];

/** Whether a rollout has a measure. */
export const has = (name, rollout, now) => MEASURES[name].values(rollout, now) !== null;

export function maximum(values) {
  let max = 0;
  for (const value of values) if (value > max) max = value;
  return max;
}

/** [T] step of strength 0..LEVELS - 1, MISSING where there is no value. */
export function levels(name, rollout, now) {
  const {values: of, strength} = MEASURES[name];
  const values = of(rollout, now);
  const max = name === "weight" ? maximum(values) : 1;
  const steps = new Uint8Array(rollout.T);
  for (let t = 0; t < rollout.T; t++) {
    const value = values[t];
    steps[t] = Number.isNaN(value) ? MISSING
      : Math.min(LEVELS - 1, Math.max(0, Math.floor(strength(value, max) * LEVELS)));
  }
  return steps;
}
