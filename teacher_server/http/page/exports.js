// What can be taken along: a table, a picture, the recorded row.

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
const cell = (value) => value === null || value === undefined || Number.isNaN(value) ? ""
  : typeof value === "number" ? String(Number(value.toPrecision(7))) : quoted(value);

/** One row a token, with drift and reliability under the policy that is set. */
export function csv(rollout, now) {
  const columns = {
    position: (t) => t, token_id: (t) => rollout.ids[t],
    text: (t) => rollout.text(rollout.ids[t]) ?? "",
    teacher_logprob: (t) => rollout.logprobs[t], behavior_logprob: (t) => rollout.behavior?.[t],
    overlap: (t) => now.overlaps?.[t], bad_event: (t) => now.bad[t], drift: (t) => now.drift[t],
    reliability: (t) => now.reliability[t], reverse_kl: (t) => rollout.kl?.[t],
    weight: (t) => rollout.weight?.[t], entropy: (t) => rollout.entropies?.[t],
    rank: (t) => rollout.ranks?.[t], counts: (t) => rollout.mask?.[t],
  };
  const lines = [Object.keys(columns).join(",")];
  for (let t = 0; t < rollout.T; t++) {
    lines.push(Object.values(columns).map((of) => cell(of(t))).join(","));
  }
  return new Blob([lines.join("\n") + "\n"], {type: "text/csv"});
}
