// What is shown as one: a token, or the tokens that share a character.
//
// A byte-level BPE cuts characters into pieces that are no text of their own; the server gives such
// a piece by its name in the vocabulary, one character a byte. A run of pieces that together are
// UTF-8 is one unit, and so are tokens that end within a joined character (accents, emoji).

const MAX_TOKENS = 32; // of one unit

/** Byte of each character of byte-level vocabularies. */
const BYTE_OF = (() => {
  const map = new Map();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const shown = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    map.set(shown ? byte : next++, byte);
  }
  return map;
})();
const UTF8 = new TextDecoder("utf-8", {fatal: true});
const FALLBACK = /^<0x([0-9A-Fa-f]{2})>$/;

/** The bytes of a piece that is no text alone; null for one that is. */
export function pieceBytes(text) {
  const fallback = FALLBACK.exec(text);
  if (fallback) return [parseInt(fallback[1], 16)];
  const bytes = [];
  for (const character of text) {
    const byte = BYTE_OF.get(character.codePointAt(0));
    if (byte === undefined) return null;
    bytes.push(byte);
  }
  return bytes.some((byte) => byte > 127) && decoded(bytes) === null ? bytes : null;
}

function decoded(bytes) {
  try { return UTF8.decode(Uint8Array.from(bytes)); } catch { return null; }
}

/** What a token without a text is shown as. */
export const byId = (id) => `\u27e8${id}\u27e9`;

/** [{first, num, text}] of token ids; `textOf` gives a text or null. Every token is in one unit. */
export function unitsOf(ids, textOf) {
  return joined(pieces(ids, textOf));
}

function pieces(ids, textOf) {
  const units = [];
  const bytesOf = new Map();
  const bytes = (id) => {
    if (!bytesOf.has(id)) {
      const text = textOf(id);
      bytesOf.set(id, text ? pieceBytes(text) : null);
    }
    return bytesOf.get(id);
  };
  for (let t = 0; t < ids.length;) {
    const whole = bytes(ids[t]) === null ? null : character(ids, t, bytes);
    if (whole !== null) {
      units.push({first: t, ...whole});
      t += whole.num;
    } else {
      units.push({first: t, num: 1, text: textOf(ids[t]) || byId(ids[t])});
      t += 1;
    }
  }
  return units;
}

/** The shortest run of pieces from t on that is text. */
function character(ids, t, bytes) {
  const run = [];
  for (let num = 1; num <= MAX_TOKENS && t + num <= ids.length; num++) {
    const more = bytes(ids[t + num - 1]);
    if (more === null) return null;
    run.push(...more);
    const text = decoded(run);
    if (text !== null) return {num, text};
  }
  return null;
}

/** Units that end within a character as readers see it become one. */
function joined(units) {
  const whole = units.map((unit) => unit.text).join("");
  if (!/[^\x00-\x7f]/.test(whole) || typeof Intl.Segmenter === "undefined") return units;
  const starts = new Set();
  for (const segment of new Intl.Segmenter().segment(whole)) starts.add(segment.index);
  const merged = [];
  let offset = 0;
  for (const unit of units) {
    const last = merged[merged.length - 1];
    if (starts.has(offset) || !last || last.num + unit.num > MAX_TOKENS) merged.push({...unit});
    else { last.num += unit.num; last.text += unit.text; }
    offset += unit.text.length;
  }
  return merged;
}

/** A text with what has no shape made visible; newlines end a line by themselves. */
export function visible(text) {
  return text.replace(/[\x00-\x1f\x7f\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g, (c) => {
    if (c === "\n") return "\u21b5";
    if (c === "\t") return "\u21e5";
    if (c === "\u200d") return c; // joins
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : "\u00b7";
  });
}

/** The same on one line, with spaces to count. */
export const oneLine = (text) => visible(text).replaceAll(" ", "\u00b7");
