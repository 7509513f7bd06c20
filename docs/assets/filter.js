/* A text field where a page says <div class="lfu-filter-here"></div>: rows below it that do not have the text are hidden,
   and so are headings of tables without a row that is left. */
document.addEventListener("DOMContentLoaded", () => {
  const place = document.querySelector(".lfu-filter-here")
  if (!place) return
  const field = document.createElement("input")
  field.type = "search"
  field.className = "lfu-filter"
  field.placeholder = place.dataset.hint || "Filter the rows"
  field.setAttribute("aria-label", field.placeholder)
  place.append(field)
  const tables = [...document.querySelectorAll("article table")].filter(
    (table) => place.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING,
  )
  const headingOf = (table) => {
    let before = table.closest("article > *")
    while (before && !/^H[23]$/.test(before.tagName)) before = before.previousElementSibling
    return before
  }
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase()
    for (const table of tables) {
      let left = 0
      for (const row of table.querySelectorAll("tbody tr")) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted)
        left += !row.hidden
      }
      for (const part of [headingOf(table), table.closest("article > *")]) if (part) part.hidden = !left
    }
  })
})
