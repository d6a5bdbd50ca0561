// Requests to this server. The token stays in this page's memory: never in a link, never stored.

export const PARQUET = "application/vnd.apache.parquet";
let token = "";
let onUnauthenticated = () => {};

/** What the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.type = error.type;
  }
}

export function setToken(value) { token = value; }
export function whenUnauthenticated(callback) { onUnauthenticated = callback; }

async function asked(path, {body, accept, signal} = {}) {
  const headers = {Accept: accept ?? "application/json"};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
  });
  if (reply.ok) return reply;
  if (reply.status === 401) onUnauthenticated();
  const content = await reply.json().catch(() => null);
  const error = content?.error ?? {type: "HTTP", message: `the server answered ${reply.status}`};
  throw new Refused(reply.status, error);
}

const part = encodeURIComponent;

export const info = () => asked("v1/info").then((reply) => reply.json());
export const runs = () => asked("v1/runs").then((reply) => reply.json());
export const steps = (run, before) => asked(
  `v1/runs/${part(run)}${before ? `?before=${before}` : ""}`).then((reply) => reply.json());
export const rollouts = (run, step) =>
  asked(`v1/runs/${part(run)}/steps/${step}`).then((reply) => reply.json());
const rolloutPath = (run, step, index) => `v1/runs/${part(run)}/steps/${step}/rollouts/${index}`;
export const rollout = (run, step, index) =>
  asked(rolloutPath(run, step, index)).then((reply) => reply.json());
export const rolloutFile = (run, step, index) =>
  asked(rolloutPath(run, step, index), {accept: PARQUET}).then((reply) => reply.blob());
export const analyze = (body) => asked("v1/analyze", {body}).then((reply) => reply.json());
