// Counting checks, and a browser that notes what it should not see.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const ARGUMENTS = [
  "--no-sandbox",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export class Tally {
  passed = 0;
  failures = [];

  async check(name, body) {
    try {
      await body();
      this.passed += 1;
      console.log(`  ok      ${name}`);
    } catch (error) {
      this.failures.push(name);
      console.log(`  FAILED  ${name}\n          ${String(error?.message ?? error).split("\n").slice(0, 12).join("\n          ")}`);
    }
  }

  finish() {
    console.log(`${this.passed} passed, ${this.failures.length} failed`);
    for (const name of this.failures) console.log(`  failed: ${name}`);
    return this.passed > 0 && this.failures.length === 0 ? 0 : 1;
  }
}

export async function launch(executablePath, { gpu }) {
  const extra = gpu ? ["--enable-unsafe-webgpu"] : [];
  return chromium.launch({ executablePath, headless: true, args: [...ARGUMENTS, ...extra] });
}

// A page that remembers errors, and every request that leaves `origin`.
export async function open(browser, origin, options = {}) {
  const context = await browser.newContext({
    viewport: { width: 1280, height: 860 },
    serviceWorkers: "block",
    reducedMotion: "reduce",
    ...options,
  });
  const page = await context.newPage();
  page.setDefaultTimeout(30_000);
  const seen = { errors: [], strays: [] };
  page.on("pageerror", (error) => seen.errors.push(error.message));
  context.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(origin) && !/^(data|blob):/.test(url)) seen.strays.push(url);
  });
  return { context, page, seen };
}

export function assertClean(seen) {
  assert.deepEqual(seen.errors, [], "errors on the page");
  assert.deepEqual(seen.strays, [], "requests that left the origin");
}

export const hash = (page) => page.evaluate(() => location.hash);

export async function waitHash(page, pattern) {
  await page.waitForFunction(([source]) => new RegExp(source).test(location.hash), [pattern.source]);
}
