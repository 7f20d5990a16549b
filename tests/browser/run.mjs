// The built page in Chromium, with a WebGPU adapter and with none.
//
//   node run.mjs --site DIR [--screenshots DIR]
//
// DIR is what `stratascope site --out DIR` writes. CHROMIUM names the browser; else it is looked for on PATH.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { flow } from "./flow.mjs";
import { assertClean, hash, launch, open, Tally, waitHash } from "./harness.mjs";
import { serve } from "./server.mjs";

const { values: options } = parseArgs({ options: { site: { type: "string" }, screenshots: { type: "string" } } });
if (!options.site) {
  console.error("usage: node run.mjs --site DIR [--screenshots DIR]");
  process.exit(2);
}
const executable = process.env.CHROMIUM ?? execFileSync("which", ["chromium"], { encoding: "utf8" }).trim();
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const catalogue = JSON.parse(readFileSync(join(options.site, "packs/index.json"), "utf8"));
const { name: pack, path: folder } = catalogue.packs[0];
const index = JSON.parse(readFileSync(join(options.site, "packs", folder, "index.json"), "utf8"));
const texts = JSON.parse(readFileSync(join(options.site, "packs", folder, "texts.json"), "utf8"));
const layered = catalogue.packs.find((entry) => entry.layers);
const acrossLayers = layered && JSON.parse(readFileSync(join(options.site, "packs", layered.path, "flow.json"), "utf8"));
const site = await serve(options.site);
const tally = new Tally();
const codes = {};
const flowCodes = {};

const go = async (page, route) => {
  await page.goto(`${site.url}${route}`);
  await page.waitForSelector("main h1");
};
const encoded = (page) => page.waitForSelector("#facts[data-backend]");

async function readCodes(page) {
  await page.click("#show-codes");
  await page.waitForSelector("#codes tbody tr");
  const rows = await page.$$eval("#codes tbody tr", (rows) => rows.map((r) => r.lastElementChild.textContent));
  // The same active set, whatever the last digits: latents without values, in their own order.
  return rows.map((row) => [...row.matchAll(/#(\d+)/g)].map((m) => Number(m[1])).sort((a, b) => a - b));
}

// The first latent that was removed from the first text across layers: the first number of a tensor.
function removed() {
  const bytes = readFileSync(join(options.site, "packs", layered.path, acrossLayers[0].file));
  const length = Number(bytes.readBigUInt64LE(0));
  const { effect_latents: tensor } = JSON.parse(bytes.subarray(8, 8 + length).toString());
  return bytes.readUInt32LE(8 + length + tensor.data_offsets[0]);
}

async function flows(page, mode) {
  const wish = mode === "gpu" ? "backend=gpu" : "";
  const query = wish && `?${wish}`;
  await tally.check(`${mode}: overview shows every pack with its figures`, async () => {
    await go(page, `#/${query}`);
    await page.waitForSelector("article.pack .chart svg rect");
    assert.equal(await page.locator("article.pack").count(), catalogue.packs.length);
    await page.waitForFunction((m) => document.querySelector("details.backend")?.dataset.backend === m, mode);
    await page.click("details.backend summary");
    assert.match(await page.textContent("details.backend .popover"), mode === "gpu" ? /adapter/i : /No WebGPU here/);
  });
  await tally.check(`${mode}: the list sorts, searches, and keeps both in the address`, async () => {
    await page.click("article.pack .actions a >> nth=0");
    await waitHash(page, new RegExp(`^#/p/${pack}`));
    await page.waitForSelector(".rows .row");
    await page.click(".c-density button");
    await waitHash(page, /sort=density/);
    await page.waitForSelector("[aria-sort=descending].c-density");
    const density = await page.$$eval(".rows .row .c-density", (cells) => cells.map((c) => parseFloat(c.textContent) || 0));
    const sorted = [...density].sort((a, b) => b - a);
    assert.ok(density.length > 5 && density[0] > density.at(-1), "several densities");
    assert.deepEqual(density, sorted);
    const word = index.top_tokens.flat().find((w) => /\w{3}/.test(w)).trim();
    await page.fill("#search", word);
    await waitHash(page, /q=/);
    const wanted = index.top_tokens.filter((tokens, i) =>
      [...tokens, ...index.top_logits[i]].some((t) => t.toLowerCase().includes(word.toLowerCase()))).length;
    await page.waitForFunction((n) => document.querySelector("p.count").textContent.startsWith(`${n} of`), wanted);
    const kept = await hash(page);
    await page.reload();
    await page.waitForSelector(".rows .row");
    assert.equal(await page.inputValue("#search"), word);
    assert.equal(await hash(page), kept);
  });
  await tally.check(`${mode}: a feature shows all its parts`, async () => {
    await page.click(".rows .row a >> nth=0");
    await waitHash(page, /\/f\/\d+/);
    await page.waitForSelector(".feature-grid");
    assert.equal(await page.locator("table.logits").count(), 2);
    assert.ok((await page.locator("section .chart svg").count()) >= 2);
    assert.ok((await page.locator("ol.near li").count()) > 0);
    assert.ok((await page.locator(".example .tok.on").count()) > 0);
    await page.click(".example button >> nth=0");
    await page.waitForSelector(".example.open");
  });
  await keyboard(page, mode);
  await tryIt(page, mode, query);
  if (layered) await flow({ page, mode, query, pack: layered.name, texts: acrossLayers, removed: removed(), go, tally, codes: flowCodes });
  await tally.check(`${mode}: the conformance suite passes inside the page`, async () => {
    await go(page, `#/selftest${query}`);
    await page.waitForSelector("[data-selftest=done]", { timeout: 300_000 });
    const rows = await page.$$eval("[data-verdict]", (rows) => rows.map((r) => [r.dataset.backend, r.dataset.verdict]));
    assert.deepEqual(Object.fromEntries(rows), mode === "gpu" ? { cpu: "passed", gpu: "passed" } : { cpu: "passed", gpu: "absent" });
  });
}

async function keyboard(page, mode) {
  await tally.check(`${mode}: the keyboard goes everywhere`, async () => {
    await go(page, `#/p/${pack}/f/1`);
    await page.reload(); // forgets the list that was searched, whose order j and k would follow
    await page.waitForSelector(".feature-grid");
    await step(page, "j", /\/f\/1$/, /\/f\/2$/);
    await step(page, "k", /\/f\/2$/, /\/f\/1$/);
    await page.keyboard.press("?");
    await page.waitForSelector("dialog[open]");
    await page.keyboard.press("Escape");
    await page.waitForSelector("dialog", { state: "hidden" });
    const before = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.keyboard.press("d");
    const after = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    assert.notEqual(before, after, "the theme changes");
    await page.keyboard.press("d");
    await page.keyboard.press("r");
    await page.waitForTimeout(100);
    assert.match(await hash(page), /\/f\/\d+$/);
    await chord(page, "t", /\/try$/);
    await encoded(page);
    // A page that has just been drawn takes the focus to its heading; whoever was faster presses again.
    await poll(async () => {
      await page.keyboard.press("/");
      await page.waitForTimeout(300);
      return page.evaluate(() => document.activeElement?.id === "search");
    });
    await page.keyboard.press("Tab");
    await page.evaluate(() => document.activeElement.blur());
    await chord(page, "o", /^#\/$/);
  });
}

// A page that has just been drawn may not listen yet: the key is pressed until it is heard, but never twice.
async function step(page, key, from, to) {
  await poll(async () => {
    if (from.test(await hash(page))) await page.keyboard.press(key);
    await page.waitForTimeout(300);
    return to.test(await hash(page));
  });
}

// `g` and a second key count as one only when they follow each other quickly, which a busy machine may not manage.
async function chord(page, key, wanted) {
  await poll(async () => {
    await page.keyboard.press("g");
    await page.keyboard.press(key);
    await page.waitForTimeout(300);
    return wanted.test(await hash(page));
  });
}

async function tryIt(page, mode, query) {
  const text = texts[1]?.id ?? texts[0].id;
  await tally.check(`${mode}: a text is encoded on the backend that is named`, async () => {
    await go(page, `#/p/${pack}/try${query}`);
    await encoded(page);
    assert.equal(await page.getAttribute("#facts", "data-backend"), mode);
    assert.ok((await page.locator("#strip .tok.on").count()) > 3, "tokens light up");
    codes[mode] = await readCodes(page);
    assert.equal(codes[mode].length, texts[0].words.length);
    assert.ok(codes[mode].flat().length > 10, "codes in words");
  });
  await tally.check(`${mode}: hover previews, click locks, arrows move, Esc unlocks, reload restores`, async () => {
    await page.selectOption("#text", text);
    await waitHash(page, new RegExp(`text=${text}`));
    await encoded(page);
    const token = page.locator("#strip .tok.on >> nth=2");
    await token.hover();
    await page.waitForFunction(() => /^Token \d+/.test(document.querySelector("#h-panel").textContent));
    assert.doesNotMatch(await hash(page), /tok=/);
    await token.click();
    await waitHash(page, /tok=\d+/);
    const at = Number((await hash(page)).match(/tok=(\d+)/)[1]);
    await page.keyboard.press("ArrowRight");
    await waitHash(page, new RegExp(`tok=${at + 1}`));
    await page.keyboard.press("ArrowLeft");
    await waitHash(page, new RegExp(`tok=${at}(&|$)`));
    await page.click(".latents .shade >> nth=0");
    await waitHash(page, /latent=\d+/);
    const latent = Number((await hash(page)).match(/latent=(\d+)/)[1]);
    await page.mouse.move(5, 5);
    const kept = await hash(page);
    const lit = await page.$$eval("#strip .tok", (t) => t.map((x) => x.classList.contains("on")));
    await page.reload();
    await encoded(page);
    await page.waitForSelector("#strip .locked");
    assert.equal(await hash(page), kept);
    assert.deepEqual(await page.$$eval("#strip .tok", (t) => t.map((x) => x.classList.contains("on"))), lit);
    const rows = await readCodes(page);
    assert.deepEqual(lit, rows.map((row) => row.includes(latent)), "shading follows the codes");
    await page.keyboard.press("Escape");
    await page.waitForSelector("#strip .locked", { state: "detached" });
  });
  if (mode !== "gpu") return;
  await tally.check("gpu: a lost device is replaced, with the same codes", async () => {
    await go(page, `#/p/${pack}/try${query}`);
    await encoded(page);
    await page.evaluate(() => window.dispatchEvent(new Event("stratascope-lose-device")));
    await page.selectOption("#text", text);
    await page.waitForFunction((t) => location.hash.includes(`text=${t}`), text);
    await encoded(page);
    await page.selectOption("#text", texts[0].id);
    await page.waitForFunction((t) => location.hash.includes(`text=${t}`), texts[0].id);
    await encoded(page);
    await page.waitForFunction((n) => document.querySelectorAll("#strip .tok").length === n, texts[0].words.length);
    assert.equal(await page.getAttribute("#facts", "data-backend"), "gpu");
    assert.deepEqual(await readCodes(page), codes.gpu);
  });
  await tally.check("gpu: backend=cpu in the address is obeyed", async () => {
    await go(page, `#/p/${pack}/try?backend=cpu`);
    await page.reload();
    await page.waitForSelector("#facts[data-backend=cpu]");
    assert.deepEqual(await readCodes(page), codes.gpu);
  });
}

const ROUTES = {
  overview: [`#/`, "article.pack .chart"],
  list: [`#/p/${pack}?sort=density`, ".rows .row"],
  feature: [`#/p/${pack}/f/1`, ".feature-grid"],
  try: [`#/p/${pack}/try?tok=5`, "#facts"],
  ...(layered && { flow: [`#/p/${layered.name}/flow?tok=40&layer=10`, "#flow-panel[data-latent]"] }),
  selftest: [`#/selftest`, "[data-selftest=done]"],
  nowhere: [`#/no/such/page`, "main h1"],
};

async function looks(browser) {
  for (const [size, viewport] of Object.entries({ desktop: { width: 1280, height: 860 }, phone: { width: 390, height: 844 } })) {
    for (const colorScheme of ["light", "dark"]) {
      const { context, page, seen } = await open(browser, site.origin, { viewport, colorScheme });
      for (const [name, [route, ready]] of Object.entries(ROUTES)) {
        await tally.check(`${name}, ${colorScheme}, ${size}: accessible, nothing sticks out`, async () => {
          await go(page, route);
          await page.waitForSelector(ready, { timeout: 120_000 });
          if (options.screenshots) {
            mkdirSync(options.screenshots, { recursive: true });
            await page.screenshot({ path: join(options.screenshots, `${name}-${colorScheme}-${size}.png`), fullPage: name !== "list" });
          }
          const width = await page.evaluate(() => document.scrollingElement.scrollWidth);
          assert.ok(width <= viewport.width, `the page is ${width} px wide`);
          await page.evaluate(axe);
          const { violations } = await page.evaluate(() =>
            axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"] }));
          const found = violations.map((v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => `${n.target} ${n.any[0]?.message ?? ""}`).join(" | ")}`);
          assert.deepEqual(found, []);
        });
      }
      await tally.check(`${colorScheme}, ${size}: no errors, no other origin`, async () => assertClean(seen));
      await context.close();
    }
  }
}

async function damage(browser) {
  const cases = [
    ["a missing list of packs", "**/packs/index.json", { status: 404, body: "" }, "#/", /HTTP status 404/],
    ["a list that is no JSON", "**/packs/index.json", { body: "<html>" }, "#/", /packs\/index.json/],
    ["a missing manifest", "**/pack.json", { status: 404, body: "" }, `#/p/${pack}`, /HTTP status 404/],
    ["a damaged index", "**/index.safetensors*", { body: "damaged" }, `#/p/${pack}`, /index.safetensors/],
    ["a damaged shard", "**/features/*.json*", { body: "{}" }, `#/p/${pack}/f/1`, /wanted \d+ bytes/],
    ["a missing encoder", "**/encoder.safetensors*", { status: 404, body: "" }, `#/p/${pack}/try`, /encoder.safetensors/],
    ...(layered
      ? [
          ["a damaged text across layers", "**/flow/00.safetensors*", { body: "damaged" }, `#/p/${layered.name}/flow`, /flow\/00.safetensors/],
          ["vectors that are missing", "**/flow/00.x.safetensors*", { status: 404, body: "" }, `#/p/${layered.name}/flow?live=1`, /HTTP status 404/],
          ["a missing lens", "**/flow/lens/*", { status: 404, body: "" }, `#/p/${layered.name}/flow?latent=1`, /HTTP status 404/],
          ["layers where there is one", null, null, `#/p/${pack}/flow`, /of one layer/],
        ]
      : []),
    ["an unknown pack", null, null, "#/p/no-such-pack", /no-such-pack/],
    ["a latent out of range", null, null, `#/p/${pack}/f/4000000000`, /latents 0 to/],
  ];
  for (const [name, glob, answer, route, message] of cases) {
    const { context, page, seen } = await open(browser, site.origin);
    await tally.check(`${name} is drawn with its reason, and can be tried again`, async () => {
      if (glob) await page.route(glob, (r) => r.fulfill(answer));
      await page.goto(`${site.url}${route}`);
      const alert = page.locator(".failure").first();
      await alert.waitFor();
      assert.match(await alert.textContent(), message);
      if (glob) {
        await page.unroute(glob);
        await page.click(".failure button >> nth=0");
        await page.waitForSelector(".failure", { state: "detached" });
      }
      assert.deepEqual(seen.errors, []);
    });
    await context.close();
  }
}

async function poll(question, timeout = 30_000) {
  for (const end = Date.now() + timeout; !(await question()); ) {
    if (Date.now() > end) throw new Error(`still no after ${timeout} ms: ${question}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function offline(browser) {
  const { context, page, seen } = await open(browser, site.origin, { serviceWorkers: "allow" });
  const visited = [ROUTES.overview, ROUTES.list, ROUTES.feature, ROUTES.try, ROUTES.flow].filter(Boolean);
  await tally.check("visited pages work offline, after a reload too", async () => {
    await go(page, "#/");
    await page.evaluate(() => navigator.serviceWorker.ready);
    await page.waitForFunction(() => navigator.serviceWorker.controller !== null);
    // `waitForFunction` takes a promise for a yes, so an asynchronous question must be polled here.
    await poll(() =>
      page.evaluate(async () => {
        const kept = await (await caches.open("stratascope-1")).keys();
        return ["/pack.json", "/packs/index.json", ".wasm"].every((end) => kept.some((r) => new URL(r.url).pathname.endsWith(end)));
      }),
    );
    for (const [route, ready] of visited) {
      await go(page, route);
      await page.waitForSelector(ready);
    }
    await context.setOffline(true);
    for (const [route, ready] of visited) {
      await page.goto("about:blank");
      await go(page, route);
      await page.waitForSelector(ready);
    }
    assertClean(seen);
  });
  await context.close();
}

for (const mode of ["gpu", "cpu"]) {
  console.log(mode === "gpu" ? "With a WebGPU adapter (software)" : "Without a WebGPU adapter");
  const browser = await launch(executable, { gpu: mode === "gpu" });
  const { context, page, seen } = await open(browser, site.origin);
  await flows(page, mode);
  await tally.check(`${mode}: no errors, no other origin`, async () => assertClean(seen));
  await context.close();
  if (mode === "cpu") {
    await tally.check("both backends give the same active latents", async () => {
      assert.ok(codes.gpu?.flat().length > 0);
      assert.deepEqual(codes.cpu, codes.gpu);
      assert.deepEqual(flowCodes.cpu, flowCodes.gpu);
    });
    await looks(browser);
    await damage(browser);
    await offline(browser);
  }
  await browser.close();
}
site.close();
process.exit(tally.finish());
