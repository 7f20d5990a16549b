// The page across the layers: three linked maps, ribbons, the latent below, live encoding, and how long a frame takes.
import assert from "node:assert/strict";
import { hash, waitHash } from "./harness.mjs";

const ready = (page) => page.waitForSelector("#flow-panel[data-latent]");

// The middle of a cell of a map, in shares of its width and height.
async function cell(page, map, column, columns, row, rows) {
  await page.locator(map).scrollIntoViewIfNeeded();
  const box = await page.locator(map).boundingBox();
  return { x: box.x + ((column + 0.5) / columns) * box.width, y: box.y + ((row + 0.5) / rows) * box.height };
}

async function table(page) {
  if ((await page.getAttribute("#show-table", "aria-expanded")) !== "true") await page.click("#show-table");
  await page.waitForSelector("#flow-codes tbody tr");
  return page.$$eval("#flow-codes tbody tr", (rows) => rows.map((r) => [...r.cells].map((c) => c.textContent)));
}

const latents = (text) => [...text.matchAll(/#(\d+)/g)].map((m) => Number(m[1])).sort((a, b) => a - b);

export async function flow({ page, mode, query, pack, texts, removed, go, tally, codes }) {
  const { words } = texts[0];
  const n = words.length;
  const layers = 30;
  await tally.check(`${mode}: a pack of several layers leads to its texts across them`, async () => {
    await go(page, `#/${query}`);
    await page.click(`article.pack a.primary:text-is("Flow")`);
    await waitHash(page, new RegExp(`^#/p/${pack}/flow`));
    await ready(page);
    assert.equal(await page.locator("nav a[aria-current=page]").textContent(), "Flow");
    assert.equal(await page.getAttribute("#facts", "data-backend"), "pack");
    assert.equal(await page.locator("#flow-strip .tok").count(), n);
    for (const map of ["#flow-latent", "#flow-token", "#flow-layer"]) {
      const drawn = await page.$$eval(`${map} .cells path`, (paths) => paths.map((p) => p.getAttribute("d")).join(""));
      assert.ok(drawn.length > 100, `${map} is drawn`);
    }
    const drawn = await page.getAttribute("#flow-ribbons .ribbon", "d");
    assert.ok(drawn.split("M").length > layers, "ribbons join the layers");
  });
  await tally.check(`${mode}: pointing at a map previews, clicking locks, the others follow`, async () => {
    const before = await page.textContent("#h-layer");
    const spot = await cell(page, "#flow-latent", 40, n, 4, layers);
    await page.mouse.move(spot.x, spot.y);
    // Layers go upwards: the fifth row from the top of thirty is layer 25.
    await page.waitForFunction(() => /^Token 40 .*layer 25/.test(document.querySelector("#flow-here").textContent));
    assert.match(await page.textContent("#h-token"), /^Token 40/);
    assert.match(await page.textContent("#h-layer"), /^Layer 25/);
    assert.doesNotMatch(await hash(page), /tok=/);
    await page.mouse.move(3, 3);
    await page.waitForFunction((text) => document.querySelector("#h-layer").textContent === text, before);
    await page.mouse.click(spot.x, spot.y);
    await waitHash(page, /tok=40&layer=25/);
    const row = await cell(page, "#flow-token", 10, layers, 2, await rows(page, "#flow-token"));
    await page.mouse.click(row.x, row.y);
    await waitHash(page, /tok=40&layer=10&latent=\d+/);
    const latent = Number((await hash(page)).match(/latent=(\d+)/)[1]);
    await page.mouse.move(3, 3);
    await page.waitForSelector(`#flow-panel[data-latent="${latent}"]`);
    assert.match(await page.textContent("#h-latent"), new RegExp(`^Latent #${latent} `));
  });
  await tally.check(`${mode}: arrows move in a map, a reload restores, Esc unlocks`, async () => {
    await page.focus("#flow-latent");
    for (const [key, wanted] of [["ArrowRight", /tok=41&layer=10/], ["ArrowUp", /tok=41&layer=11/], ["ArrowLeft", /tok=40&layer=11/], ["ArrowDown", /tok=40&layer=10/]]) {
      await page.keyboard.press(key);
      await waitHash(page, wanted);
    }
    await page.focus("#flow-token");
    const [kept, before] = [await hash(page), await page.textContent("#h-latent")];
    await page.keyboard.press("ArrowDown");
    await page.waitForFunction((text) => document.querySelector("#h-latent").textContent !== text, before);
    await page.keyboard.press("ArrowUp");
    await waitHash(page, new RegExp(`${kept.replace(/[?#]/g, "\\$&")}$`));
    const here = await page.textContent("#flow-here");
    await page.reload();
    await ready(page);
    assert.equal(await hash(page), kept);
    assert.equal(await page.textContent("#flow-here"), here);
    await page.evaluate(() => document.activeElement.blur());
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => !/tok=|layer=|latent=/.test(location.hash));
  });
  await tally.check(`${mode}: the table says what the maps show`, async () => {
    await go(page, `#/p/${pack}/flow?tok=40&layer=10${query.replace("?", "&")}`);
    await ready(page);
    const token = await table(page);
    assert.equal(token.length, layers);
    await page.selectOption("#table-of", "layer");
    await page.waitForFunction((rows) => document.querySelectorAll("#flow-codes tbody tr").length === rows, n);
    const layer = await table(page);
    assert.equal(layer[0][1], "not encoded");
    assert.deepEqual(layer[40].slice(1), token[10].slice(1), "the same place from both sides");
    await page.selectOption("#table-of", "latent");
    await page.waitForFunction(() => /^Latent/.test(document.querySelector("#flow-codes caption").textContent));
  });
  await tally.check(`${mode}: what goes with a latent stands beside what changes without it`, async () => {
    await go(page, `#/p/${pack}/flow?latent=${removed}${query.replace("?", "&")}`);
    await page.waitForSelector(`#flow-panel[data-latent="${removed}"]`);
    const [goesWith, causes] = [page.locator("section[aria-labelledby=h-with]"), page.locator("section[aria-labelledby=h-causes]")];
    assert.match(await goesWith.textContent(), /a correlation, not a cause/);
    assert.match(await causes.textContent(), /taken out at layer 10 of this text/);
    assert.ok((await causes.locator("tbody tr").count()) > 5 && (await goesWith.locator("tbody tr").count()) > 0);
    assert.ok((await page.locator("section[aria-labelledby=h-lens] tbody tr").count()) > 0, "a lens by layer");
    assert.ok((await page.locator(".flow-layers rect").count()) === layers);
  });
  await tally.check(`${mode}: encoded here, the text has the active latents of the pack`, async () => {
    await go(page, `#/p/${pack}/flow?tok=40&live=1${query.replace("?", "&")}`);
    await page.waitForSelector(`#facts[data-backend=${mode}]`, { timeout: 120_000 });
    assert.equal(await page.getAttribute("#facts", "data-differs"), "0");
    assert.match(await page.textContent("#facts"), /the same active latents as in the pack/);
    codes[mode] = (await table(page)).map((row) => latents(row[2]));
    assert.ok(codes[mode].flat().length > layers);
  });
  await frames(page, mode, query, pack, n, go, tally);
}

const rows = (page, map) => page.$eval(`${map} svg`, (svg) => Number(svg.getAttribute("viewBox").split(" ")[3]));

// The pointer sweeps over the largest map, a cell a frame, and every frame redraws the two other maps and the ribbons.
async function frames(page, mode, query, pack, n, go, tally) {
  await tally.check(`${mode}: ${n} tokens × 30 layers stay fluid under a moving pointer`, async () => {
    await go(page, `#/p/${pack}/flow${query}`);
    await ready(page);
    const times = await page.evaluate(async () => {
      const map = document.querySelector("#flow-latent");
      map.scrollIntoView({ block: "center" });
      const area = map.getBoundingClientRect();
      const frame = () => new Promise(requestAnimationFrame);
      const work = [];
      for (let i = 0; i < 60; i++) {
        const [x, y] = [((i * 37) % 120) / 120, ((i * 11) % 28) / 30];
        await frame();
        const start = performance.now();
        map.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: area.left + x * area.width + 2, clientY: area.top + y * area.height + 2 }));
        await new Promise((done) => setTimeout(done)); // effects run as tasks
        document.body.getBoundingClientRect(); // style and layout
        work.push(performance.now() - start);
      }
      return work.sort((a, b) => a - b);
    });
    const [median, late] = [times[30], times[56]];
    console.log(`          script, style and layout a move: median ${median.toFixed(1)} ms, 95th percentile ${late.toFixed(1)} ms`);
    // Sixty frames a second leave 16.7 ms; a busy test machine gets thrice that.
    assert.ok(median < 50, `a move takes ${median.toFixed(1)} ms`);
  });
}
