// One scored response, as the page reads it: recorded or just analysed, in flat typed arrays.
//
// Legend: T tokens, K the teacher's top-k, C the student's (0: not known); [T][K] row after row.

import {commonFrom} from "./drift.js";
import {unitsOf} from "./units.js";

const USUAL = {metric: "overlap_ratio", k: 16, threshold: 0.7, top_p: 0.95, w_drop: 0.01};

function flat(rows, width, kind) {
  const array = new kind(rows.length * width);
  rows.forEach((row, t) => {
    for (let j = 0; j < width; j++) array[t * width + j] = row[j] ?? NaN;
  });
  return array;
}

/** Numbers as they came, missing ones as NaN; null where there is no column. */
const column = (values) => values ? Float32Array.from(values, (v) => v ?? NaN) : null;
const flags = (values) => values ? Uint8Array.from(values, (v) => (v ? 1 : 0)) : null;

export class Rollout {
  constructor(reply, {candidates, atCandidates, mask, recorded}) {
    this.modelId = reply.model_id;
    this.recorded = recorded;
    this.promptIds = reply.prompt_ids;
    this.ids = Int32Array.from(reply.response_ids);
    this.T = this.ids.length;
    this.K = reply.teacher_topk_ids[0]?.length ?? 0;
    this.C = candidates?.[0]?.length ?? 0;
    this.texts = reply.texts ?? {};
    this.topkIds = flat(reply.teacher_topk_ids, this.K, Int32Array);
    this.topkLogprobs = flat(reply.teacher_topk_logprobs, this.K, Float32Array);
    this.studentIds = this.C ? flat(candidates, this.C, Int32Array) : null;
    this.atStudent = this.C && atCandidates ? flat(atCandidates, this.C, Float32Array) : null;
    this.studentLogprobs = this.C && reply.student_topk_logprobs
      ? flat(reply.student_topk_logprobs, this.C, Float32Array) : null;
    this.logprobs = column(reply.teacher_logprobs);
    this.behavior = column(reply.behavior_logprobs);
    this.kl = column(reply.reverse_kl);
    this.weight = column(reply.weight);
    this.entropies = column(reply.entropies);
    this.ranks = reply.ranks ?? null;
    this.mask = mask;
    this.warnings = reply.warnings ?? [];
    this.commonFrom = this.C
      ? commonFrom(this.studentIds, this.topkIds, this.T, this.C, this.K) : null;
    this.units = unitsOf(this.ids, (id) => this.text(id));
    this.own = ownPolicy(reply.policy, this);
  }

  /** The text of an id, null where no tokenizer knows it. */
  text(id) { return this.texts[id] ?? null; }

  get prompt() {
    return unitsOf(this.promptIds, (id) => this.text(id)).map((unit) => unit.text).join("");
  }

  get meanLogprob() {
    let sum = 0;
    for (const value of this.logprobs) sum += value;
    return this.T ? sum / this.T : NaN;
  }

  /** The largest k that both lists allow. */
  maxK(metric) {
    return Math.max(1, Math.min(255, metric === "overlap_ratio" ? Math.min(this.C, this.K) : this.K));
  }
}

/** The run's own policy where it has one, else the usual one; as far as the lists reach. */
function ownPolicy(given, rollout) {
  const policy = {...USUAL};
  for (const [name, value] of Object.entries(given ?? {})) {
    if (value !== null && name in policy) policy[name] = value;
  }
  if (!rollout.C) policy.metric = "teacher_top_p_accept";
  if (!given && policy.metric === "overlap_ratio") Object.assign(policy, {k: 8, threshold: 0.5});
  if (policy.metric !== given?.metric && policy.metric === "teacher_top_p_accept") policy.k = 255;
  policy.k = Math.min(policy.k, rollout.maxK(policy.metric));
  return policy;
}

/** What GET /v1/runs/RUN/steps/STEP/rollouts/INDEX answers. */
export function fromRecording(reply) {
  return new Rollout(reply, {
    candidates: reply.student_topk_ids,
    atCandidates: reply.teacher_logprobs_at_student_topk,
    mask: flags(reply.mask),
    recorded: reply,
  });
}

/** What POST /v1/analyze answers. */
export function fromAnalysis(reply, specialIds) {
  const special = new Set(specialIds);
  return new Rollout(reply, {
    candidates: reply.candidate_ids,
    atCandidates: reply.teacher_logprobs_at_candidates,
    mask: Uint8Array.from(reply.response_ids, (id) => (special.has(id) ? 0 : 1)),
    recorded: null,
  });
}

