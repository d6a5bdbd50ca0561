// Drift and reliability, by the definitions of teacher_wire/drift_metrics.py and drift.py; a test
// compares the two on random data. Pure: knows no page.
//
// Legend: T tokens, K the teacher's top-k, C the student's; [T][K] is flat, row after row.

export const ROUNDING = 1e-9;
export const MAX_DRIFT_K = 255;
const NEVER = 65535;

/** Smallest overlap count that is no bad event: 12 of 16 for a threshold of 0.7. */
export const minCount = (threshold, k) => Math.ceil(threshold * k * (1.0 - ROUNDING));

/** Bad events at which R reaches 0: 100 for 0.01, 4 for 0.3. */
export const badEventBudget = (wDrop) => Math.ceil((1.0 - ROUNDING) / wDrop);

/** [T][C] the place from which an entry of the student's is in both lists: in common to the first k
 *  entries of each where it is below k. A repeated entry counts once. */
export function commonFrom(studentIds, teacherIds, T, C, K) {
  const from = new Uint16Array(T * C).fill(NEVER);
  const place = new Map();
  for (let t = 0; t < T; t++) {
    place.clear();
    for (let r = K - 1; r >= 0; r--) place.set(teacherIds[t * K + r], r);
    for (let j = 0; j < C; j++) {
      const id = studentIds[t * C + j];
      const r = place.get(id);
      if (r === undefined) continue;
      from[t * C + j] = Math.max(j, r);
      place.delete(id);
    }
  }
  return from;
}

/** [T] entries that the first k of both lists have in common. */
export function overlapCounts(from, T, C, k) {
  const counts = new Uint16Array(T);
  const width = Math.min(C, k);
  for (let t = 0; t < T; t++) {
    let n = 0;
    for (let j = 0; j < width; j++) n += from[t * C + j] < k ? 1 : 0;
    counts[t] = n;
  }
  return counts;
}

/** [T] 1 where the token is outside the smallest prefix of the teacher's first k whose mass is at
 *  least topP. */
export function outsideNucleus(ids, topkIds, topkLogprobs, T, K, k, topP) {
  const outside = new Uint8Array(T).fill(1);
  const width = Math.min(K, k);
  for (let t = 0; t < T; t++) {
    let mass = 0;
    for (let j = 0; j < width && (j === 0 || mass < topP); j++) {
      if (topkIds[t * K + j] === ids[t]) { outside[t] = 0; break; }
      mass += Math.exp(topkLogprobs[t * K + j]);
    }
  }
  return outside;
}

/** [T] R_t = clip(1 - wDrop * bad events up to t, 0, 1), exactly 0 from the budget on. */
export function reliability(wDrop, bad) {
  const budget = badEventBudget(wDrop);
  const values = new Float64Array(bad.length);
  let n = 0;
  for (let t = 0; t < bad.length; t++) {
    n += bad[t];
    values[t] = n >= budget ? 0 : Math.min(1, Math.max(0, 1 - wDrop * n));
  }
  return values;
}

/** Tokens up to and with the one at which R reaches 0; null where it never does. */
export function exhaustedAt(wDrop, bad) {
  let left = badEventBudget(wDrop);
  for (let t = 0; t < bad.length; t++) {
    if (bad[t] && --left === 0) return t + 1;
  }
  return null;
}

/** What a policy makes of a rollout: overlap, bad events, their count, R, and where it is cut.
 *  `rollout` is of rollout.js; `overlaps` is null without the student's list. */
export function judged(policy, rollout) {
  const {T, K, C, ids, topkIds, topkLogprobs, mask} = rollout;
  let overlaps = null;
  let counts = null;
  const k = Math.min(policy.k, MAX_DRIFT_K);
  if (C > 0) {
    const width = Math.min(k, C, K);
    counts = overlapCounts(rollout.commonFrom, T, C, width);
    overlaps = Float32Array.from(counts, (n) => n / width);
  }
  let bad;
  if (policy.metric === "overlap_ratio" && counts !== null) {
    const least = minCount(policy.threshold, Math.min(k, C, K));
    bad = Uint8Array.from(counts, (n) => (n < least ? 1 : 0));
  } else {
    bad = outsideNucleus(ids, topkIds, topkLogprobs, T, K, k, policy.top_p);
  }
  if (mask !== null) for (let t = 0; t < T; t++) bad[t] &= mask[t];
  const drift = new Uint32Array(T);
  for (let t = 0, n = 0; t < T; t++) drift[t] = n += bad[t];
  return {
    overlaps, bad, drift,
    reliability: reliability(policy.w_drop, bad),
    cut: exhaustedAt(policy.w_drop, bad),
  };
}
