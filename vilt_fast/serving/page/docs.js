"use strict";

// Shows openapi.json, which is all that this page knows.

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function fields(schema, schemas, prefix = "") {
  const found = [];
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const inner = field.$ref || (field.allOf && field.allOf[0].$ref);
    if (inner) {
      found.push(...fields(schemas[inner.split("/").pop()], schemas, `${prefix}${name}.`));
      continue;
    }
    const needed = (schema.required || []).includes(name) ? "needed" : `default: ${JSON.stringify(field.default)}`;
    found.push(element("dt", prefix + name), element("dd", [needed, field.description].filter(Boolean).join(". ")));
  }
  return found;
}

async function main() {
  const told = await (await fetch("openapi.json")).json();
  const schemas = told.components.schemas;
  document.getElementById("about").textContent = told.info.description;
  for (const [path, ways] of Object.entries(told.paths)) {
    for (const [way, what] of Object.entries(ways)) {
      const head = element("h2", "", element("code", `${way.toUpperCase()} ${path}`));
      const article = element("article", "", head, element("p", what.summary));
      const content = what.requestBody && what.requestBody.content["application/json"].schema;
      let example = `curl ${location.origin}${path}`;
      if (content) {
        const schema = schemas[content.$ref.split("/").pop()];
        article.append(element("dl", "", ...fields(schema, schemas)));
        example += ` -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(schema.example)}'`;
      }
      article.append(element("pre", example));
      const failures = Object.entries(what.responses).filter(([status]) => status >= 400);
      if (failures.length) {
        const rows = failures.flatMap(([status, { description }]) => [element("dt", status), element("dd", description)]);
        article.append(element("p", 'Otherwise {"error": ..., "error_type": ...} with'), element("dl", "", ...rows));
      }
      document.getElementById("routes").append(article);
    }
  }
}

main().catch((error) => document.getElementById("routes").append(element("p", `openapi.json cannot be read: ${error}`)));
