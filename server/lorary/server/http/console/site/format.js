// Numbers as people read them.

/** Return 1234 as "1,234", 12.34 as "12.3" and 0.1234 as "0.12". */
export function number(value) {
  const digits = Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : Math.abs(value) >= 1 ? 1 : 2;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export const mebibytes = (bytes) => `${number(bytes / 2 ** 20)} MiB`;

/** Return seconds as "12 ms" or "1.5 s". */
export const seconds = (value) => (value < 1 ? `${number(value * 1000)} ms` : `${number(value)} s`);

/** Return a digest as far as people compare it. */
export const short = (digest) => digest.slice(0, "sha256:".length + 8);

/** Return how long ago a time was, in milliseconds since 1970; "never" for 0. */
export function ago(then) {
  if (!then) return "never";
  const passed = Math.max(0, (Date.now() - then) / 1000);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (passed >= size) return `${Math.floor(passed / size)} ${unit} ago`;
  }
  return passed < 5 ? "just now" : `${Math.floor(passed)} s ago`;
}
